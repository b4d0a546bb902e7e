"""`diptych serve --long split`: whole documents and terms over HTTP, by both engines: real processes and clients."""

import openai
import pytest
from listening import listening
from test_documents import DOCUMENT, TO_KOREAN, TRANSLATED

from diptych.finetune.commands import cli

KOREAN = {"source_language": "en", "target_language": "ko"}


@pytest.mark.parametrize("engine", ["torch", "ctranslate2"])
def test_documents_are_answered_whole(request, tmp_path, engine):
    model = request.getfixturevalue("t5_checkpoint" if engine == "torch" else "exported_t5")
    terms = tmp_path / "terms.tsv"
    terms.write_text("go\t멈춰\n", encoding="utf-8")
    command = ["serve", str(model), "--engine", engine, "--long", "split", "--name", "t5", "--queue", "20"]

    def client_of(served):
        return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)

    with listening(command, tmp_path / "log") as served:
        ask = client_of(served).completions.create
        asked = {"model": "t5", "prompt": TO_KOREAN}
        found = ask(**asked, extra_body={"input": DOCUMENT} | KOREAN)
        assert found.choices[0].text == TRANSLATED and found.choices[0].finish_reason == "stop"
        assert found.choices[0].source_pieces == 5 and found.usage.completion_tokens > 10
        chunks = list(ask(**asked, stream=True, extra_body={"input": DOCUMENT} | KOREAN))
        assert "".join(chunk.choices[0].text for chunk in chunks) == TRANSLATED
        assert chunks[-1].choices[0].source_pieces == 5
        assert ask(**asked, extra_body={"input": "***"} | KOREAN).choices[0].finish_reason  # nothing to cut
        plain = ask(model="t5", prompt="Add.", stream=True, extra_body={"input": "1 + 1"})
        assert "".join(chunk.choices[0].text for chunk in plain) == "2"
        chat = client_of(served).chat.completions.create(
            model="t5", messages=[{"role": "user", "content": "Go."}], extra_body=KOREAN
        )
        assert chat.choices[0].finish_reason
        for text, languages, said in (
            ("Go. Go.", {"source_language": "km", "target_language": "ko"}, "no sentence splitter for Khmer"),
            ("Go. " * 21, KOREAN, "cut into 21 pieces, but only 20 can wait"),
            ("Go. " * 60_000, KOREAN, "at most 200000 are read"),
        ):
            with pytest.raises(openai.BadRequestError, match=said):
                ask(**asked, extra_body={"input": text} | languages)
    with listening([*command, "--terms", str(terms)], tmp_path / "log") as served:
        found = client_of(served).completions.create(**asked, extra_body={"input": "Go. Yes."} | KOREAN)
        assert found.choices[0].terms_missed == ["멈춰"] and found.choices[0].placeholders_lost == []
        assert found.choices[0].text.endswith(" 네.")
        reason = (
            "need --engine torch" if "ctranslate2" in command else "'confidence' is for whole prompts: this one is cut"
        )
        with pytest.raises(openai.BadRequestError, match=reason):
            client_of(served).completions.create(**asked, extra_body={"input": "Go.", "confidence": True} | KOREAN)
    terms.write_text("go\t멈춰\ngo\t가\n", encoding="utf-8")
    assert cli.main([*command, "--terms", str(terms)]) == 2
