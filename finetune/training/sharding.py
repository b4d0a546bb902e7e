"""One model spread over all ranks: weights, gradients and optimizer a share on each (torch's FSDP2).

    objective = spread(objective, recipe.sharding, accelerator)      before the optimizer is made
    "none"    every rank holds all of it, and exchanges gradients (DDP): 16 bytes a weight in fp32 with AdamW
    "full"    every rank holds its share of these 16 bytes, and one layer at a time is put together where it computes

Each layer is a group, and what is in no layer (vocabulary tables, head, last norms) another, which belongs to the
objective and is whole as long as one of its passes lasts. So tied tables stay one weight; and the loss, which works
out the head's gradient by itself, is given the whole head as an input of its graph, from where the gradient goes the
way of all others. Outside a pass every weight is a share, a DTensor: optimizer and checkpoints see nothing else.

Each micro-batch's gradients are shared out at once. To wait for the last one would save time on a slow network, and
take back the memory: whole gradients on every rank. Autocast computes as without sharding, from weights in fp32, and
what it casts of a layer stays until that layer's backward pass, 2 bytes a weight, unless `gradient_checkpointing` is
set. (accelerate's own FSDP becomes DDP on a CPU without a word; this is the same with gloo on CPUs and NCCL on GPUs.)
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

from diptych.finetune.model.loss import Seq2SeqObjective


def spread(objective: Seq2SeqObjective, sharding: str, accelerator: Accelerator) -> nn.Module:
    """On this rank's device, ready for its part of a step; losses and gradients are the same either way. Its weights
    may be other objects than before."""
    if sharding == "none":
        # A family that is not in families.py may have weights without a gradient, always (the pooler of a BERT) or in
        # some steps (an expert): DDP is to look for them, and not to wait.
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=objective.family is None)
        return accelerator.prepare(objective)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    hooks = _gradient_hooks(objective)
    layers = [module for module in objective.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in reversed(layers):  # the inner ones first, should there be any
        fully_shard(layer, mesh=mesh)
    # torch would leave the last group whole after a forward pass, also where no backward pass follows
    fully_shard(objective, mesh=mesh, reshard_after_forward=True)
    if objective.family is not None:  # T5's layers hand their position bias on as a view, and nobody writes into it
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor", UserWarning)
    register_fsdp_forward_method(objective, "token_losses")
    _generate_in_a_pass(objective)
    _hook_again(objective, hooks)
    return objective


def _generate_in_a_pass(objective: Seq2SeqObjective) -> None:
    """`model.generate` finds the objective's own group whole. All ranks must call it equally often; transformers sees
    that the model is sharded, and has those that are done earlier go on with the others."""
    generate = objective.model.generate
    objective.in_a_pass = lambda call: call()
    register_fsdp_forward_method(objective, "in_a_pass")

    def generate_in_a_pass(*inputs: Any, **settings: Any) -> Any:
        return objective.in_a_pass(partial(generate, *inputs, **settings))

    objective.model.generate = generate_in_a_pass


def _gradient_hooks(objective: nn.Module) -> dict[str, list]:
    """What was registered on weights of the objective's group (lora.py: only new rows of a table are trained)."""
    named = objective.named_parameters()
    return {name: list(weight._backward_hooks.values()) for name, weight in named if weight._backward_hooks}


def _hook_again(objective: nn.Module, hooks: dict[str, list]) -> None:
    """On the whole weights that torch made in place of those, and which are first there in a pass."""

    def register(*_: Any) -> None:
        for name, of_weight in hooks.items():
            for hook in of_weight:
                objective.get_parameter(name).register_hook(hook)
        first_pass.remove()

    first_pass = objective.register_forward_pre_hook(register)
