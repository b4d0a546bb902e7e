"""The table of docs/dependencies.md: what `make install` installs, with version, licence, and what needs it.

    python docs/dependency_table.py            writes it anew, from the packages that are installed
    python docs/dependency_table.py --check    exit code 1, and why, if it is not what is installed

A licence that is not in ALLOWED is an error in both: somebody has to look at it first.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

PAGE = Path(__file__).with_name("dependencies.md")
EXTRAS = (
    *("", "sentencepiece", "clean", "documents", "thai", "serve", "gradio", "ctranslate2", "structured"),
    *("onnx", "optimizers", "sweep", "datatrove", "demo", "test"),
)
"""Of setup.py, without docs, which builds the pages only. A package is listed with the first that needs it."""
OF_CUDA = ("nvidia-", "cuda-", "triton")
"""What torch needs on Linux with a GPU, and not on the machine that wrote the table."""
APART = {"bitsandbytes"}
"""What `.ci/run` installs beside the environment of the tests: its line of the table is kept as it is."""
ALLOWED = {
    *("0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0"),
    *("CC0-1.0", "CNRI-Python", "ISC", "MIT", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Zlib"),
}
SPELLINGS = {
    r"apache( software license| license, version 2.0| 2.0 license| 2.0)?|apache-2": "Apache-2.0",
    r"mit license": "MIT",
    r"(3-clause bsd|bsd 3-clause)( license)?": "BSD-3-Clause",
    r"bsd license": "BSD",
    r"isc license( \(iscl\))?": "ISC",
    r"psfl|python software foundation license": "PSF-2.0",
    r"mozilla public license 2.0 \(mpl 2.0\)": "MPL-2.0",
}
"""What packages without a License-Expression write, as a pattern, and its SPDX name. BSD: it is not said which one."""


def licence(name: str) -> str:
    """As SPDX writes it."""
    facts = distribution(name).metadata
    classified = [it.split(" :: ")[-1] for it in facts.get_all("Classifier", []) if it.startswith("License :: ")]
    written = (facts["License"] or "").strip()
    if facts["License-Expression"]:
        return facts["License-Expression"]
    if not written or written == "UNKNOWN" or "\n" in written or written.startswith("Copyright"):
        written = " OR ".join(classified)
    for pattern, spdx in SPELLINGS.items():
        written = re.sub(f"^({pattern})$", spdx, written, flags=re.IGNORECASE)
    return written


def needed(extra: str) -> dict[str, str]:
    """Canonical names of what `diptych[extra]` needs on this machine, and how each calls itself."""
    found: dict[str, str] = {}
    due = [("diptych", extra)]
    done = set()
    while due:
        name, of_extra = due.pop()
        done.add((name, of_extra))
        try:
            package = distribution(name)
        except PackageNotFoundError:
            if name in APART:
                found[name] = name
                continue
            sys.exit(f"{name} is not installed: make install")
        if name != "diptych":
            found[re.sub(r"[-_.]+", "-", name).lower()] = package.metadata["Name"]
        for text in package.requires or ():
            requirement = Requirement(text)
            if requirement.name.startswith(OF_CUDA):
                continue
            if requirement.marker is None or requirement.marker.evaluate({"extra": of_extra}):
                due += [it for extra in ("", *requirement.extras) if (it := (requirement.name, extra)) not in done]
    return found


def rows() -> list[str]:
    first: dict[str, tuple[str, str]] = {}
    for extra in EXTRAS:
        for key, name in needed(extra).items():
            first.setdefault(key, (name, f"`{extra}`" if extra else "always"))
    lines = []
    for _, (name, extra) in sorted(first.items()):
        if name in APART:
            lines += [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {name} |")]
            continue
        terms = licence(name)
        for term in re.split(r" (?:AND|OR) ", terms.replace("(", "").replace(")", "")):
            if term not in ALLOWED:
                sys.exit(f"{name} has the licence {terms!r}, and {term!r} is not in ALLOWED of {Path(__file__).name}.")
        version = distribution(name).version.partition("+")[0]
        lines.append(f"| {name} | {version} | {terms} | {extra} |")
    return lines


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    table = "\n".join(["| package | version | licence | installed with |", "|---|---|---|---|", *rows()])
    new = re.sub(r"^\| package \|.*?(?=\n\n|\n?\Z)", lambda _: table, text, flags=re.MULTILINE | re.DOTALL)
    if "--check" in sys.argv and new != text:
        sys.exit("docs/dependencies.md lists other packages than are installed: python docs/dependency_table.py")
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
