"""One model over all ranks.

    objective = spread(objective, recipe.sharding, accelerator)      before the optimizer is made
    "none"    every rank holds the whole model, and exchanges gradients (DDP): 16 bytes a weight in fp32 with AdamW
    "full"    every rank holds its share of these 16 bytes (torch's FSDP2), and one layer at a time is put together

Each layer is an FSDP group. All other weights (vocabulary tables, head, last norms) are one more group, which belongs
to the objective and is whole during its passes. So tied tables stay one weight, and the loss, which computes the
head's gradient itself, gets the whole head. Outside a pass every weight is a share, a DTensor.

Gradients are shared out after each micro-batch: waiting for the last one would need whole gradients on every rank.
Autocast works as without sharding, from weights in fp32. Unless `gradient_checkpointing` is set, what it casts of a
layer stays until that layer's backward pass, 2 bytes a weight. (accelerate's own FSDP silently becomes DDP on a CPU;
this is the same with gloo on CPUs and NCCL on GPUs.)
"""

import warnings
from functools import partial
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers.modeling_layers import GradientCheckpointingLayer

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.model.loss import Seq2SeqObjective


def spread(objective: Seq2SeqObjective, sharding: str, accelerator: Accelerator) -> nn.Module:
    """The objective on this rank's device. Its weights may be other objects than before."""
    if sharding == "none":
        # A weight may have no gradient in some steps (an expert's), or, in a model that is not in families.py, in all.
        # DDP must look for them, or it waits forever.
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=not objective.uses_all_weights)
        return accelerator.prepare(objective)
    if objective.family is not None and not objective.family.uses_all_weights:
        raise UserError(
            f"sharding is full, but torch's FSDP2 needs a gradient of every weight on each rank, and the experts of a "
            f"{objective.model.config.model_type} may get no token there. Set sharding: none."
        )
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    # of weights whose gradients are changed (adapters.py: only the new rows of a table are trained)
    named = objective.named_parameters()
    hooks = {name: list(weight._backward_hooks.values()) for name, weight in named if weight._backward_hooks}
    layers = [module for module in objective.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in reversed(layers):  # inner layers first
        fully_shard(layer, mesh=mesh)
    # torch would leave the last group whole after a forward pass, also where no backward pass follows
    fully_shard(objective, mesh=mesh, reshard_after_forward=True)
    if objective.family is not None:  # T5's layers return their position bias as a view, which is never written to
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor", UserWarning)
    for name in ("token_losses", "answer_log_probabilities", "divergence_of"):
        if hasattr(objective, name):
            register_fsdp_forward_method(objective, name)
    _generate_in_a_pass(objective)

    def register(*_: Any) -> None:  # on the whole weights that torch made instead, which exist from the first pass on
        for name, of_weight in hooks.items():
            for hook in of_weight:
                objective.get_parameter(name).register_hook(hook)
        first_pass.remove()

    first_pass = objective.register_forward_pre_hook(register)
    return objective


def _generate_in_a_pass(objective: Seq2SeqObjective) -> None:
    """Makes the objective's own group whole during `model.generate`. All ranks must call it equally often.
    transformers sees that the model is sharded, and lets ranks that are done earlier continue with the others."""
    generate = objective.model.generate
    objective.in_a_pass = lambda call: call()
    register_fsdp_forward_method(objective, "in_a_pass")

    def generate_in_a_pass(*inputs: Any, **settings: Any) -> Any:
        return objective.in_a_pass(partial(generate, *inputs, **settings))

    objective.model.generate = generate_in_a_pass
