"""BenchSettings: what `doratune bench` measures, on which model, arms and sizes; one name for a setting and its flag."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Literal

from ..errors import UserError
from ..support.values import check_values, choices, number

STANDARD_ARMS = ("frozen", "lora", "dora", "lora_peft", "dora_peft", "dora_dense")
ARMS = (*STANDARD_ARMS, "accelerated_peft")
MEASUREMENTS = ("train_step", "decode", "mixed", "memory", "norm", "layer", "sizes", "host")
TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


@dataclass(kw_only=True)
class BenchSettings:
    """Time and memory of every way to train the same adapter, interleaved in one process; one JSON a measurement.

    Args:
        what: train_step, decode, mixed, memory, norm, layer, sizes, host
        arms: frozen, lora, dora, lora_peft, dora_peft, dora_dense, accelerated_peft
        model: hub id, local folder, smollm2-135m-instruct, or random weights: llama-8b-shape, llama-768-shape, tiny-shape
        quantize: none, or the base in nf4, fp4 or int8: train_step and memory of QLoRA and QDoRA, in a file of their own
        targets: names of the adapted layers, or all-linear
        ranks: rows of A
        dtypes: dtypes of the base; layer and sizes take the last
        batch_size: sequences of a training step
        length: tokens of a sequence
        accumulation: micro-batches of the scenario with accumulation and checkpointing
        new_tokens: tokens that a decode writes
        rounds: how often each arm runs; long measurements take a quarter, at least 5 (never more than this)
        warm_up: further rounds in front, not kept
        threads: train_step, decode and mixed are measured with each; 0: as many as the machine gives; 1: into files of their own
        tokens: rows of x for layer and sizes
        layer_sizes: sides of the square layers of layer
        hidden_sizes: sides of the square layers of sizes
        size_ranks: ranks of sizes
        norm_size: side of the square layer of norm
        norm_rank: rank of norm
        host_layers: layers of the model of host, one after the other
        host_width: side of each of them
        host_tokens: rows of x for host
        host_rank: rank of host
        host_rounds: rounds of host
        attach_layers: layers that host attaches an adapter to, timed
        device: auto, cpu or cuda
        kernel: auto, torch or triton
        output: folder of the JSON files
    """

    what: list[str] = choices(list(MEASUREMENTS), MEASUREMENTS)
    arms: list[str] = choices(list(STANDARD_ARMS), ARMS)
    model: str = "smollm2-135m-instruct"
    quantize: Literal["none", "nf4", "fp4", "int8"] = "none"
    targets: list[str] = field(default_factory=lambda: list(TARGETS))
    ranks: list[int] = number([16, 64], least=1)
    dtypes: list[Literal["float32", "bfloat16", "float16"]] = field(default_factory=lambda: ["float32", "bfloat16"])
    batch_size: int = number(4, least=1)
    length: int = number(256, least=2)
    accumulation: int = number(8, least=1)
    new_tokens: int = number(64, least=1)
    rounds: int = number(20, least=1)
    warm_up: int = number(3, least=0)
    threads: list[int] = number([0], least=0)
    tokens: int = number(512, least=1)
    layer_sizes: list[int] = number([2048, 4096], least=1)
    hidden_sizes: list[int] = number([512, 1024, 2048, 4096], least=1)
    size_ranks: list[int] = number([4, 16, 64, 256, 512], least=1)
    norm_size: int = number(8192, least=1)
    norm_rank: int = number(384, least=1)
    host_layers: int = number(24, least=1)
    host_width: int = number(64, least=1)
    host_tokens: int = number(4, least=1)
    host_rank: int = number(8, least=1)
    host_rounds: int = number(250, least=1)
    attach_layers: int = number(200, least=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    kernel: Literal["auto", "torch", "triton"] = "auto"
    output: str = "benchmarks/results"

    @property
    def few_rounds(self) -> int:
        """Rounds of a measurement that takes long."""
        return min(self.rounds, max(5, self.rounds // 4))

    def check(self) -> BenchSettings:
        """Choose the kernel, and refuse what cannot be measured.

        Raises:
            UserError: an unknown name, a number out of range, a device or kernel that this machine lacks.
        """
        for name in ("what", "arms", "targets", "ranks", "dtypes", "threads", "layer_sizes", "hidden_sizes", "size_ranks"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty; give --{name} at least one value, or leave it out for the default")
        check_values(self)
        from ..layers import passes

        self._check_arms()
        self._check_quantized()
        self.torch_device()
        passes.use(self.kernel)
        return self

    def _check_arms(self) -> None:
        if any(name.endswith("_peft") for name in self.arms) and importlib.util.find_spec("peft") is None:
            raise UserError("the arms lora_peft and dora_peft need peft: pip install peft, or leave them out of --arms")

    def _check_quantized(self) -> None:
        from ..support.models import quantization

        if self.quantize == "none":
            return
        quantization(self.quantize, None, False)
        if "dora_dense" in self.arms:
            raise UserError("arm dora_dense needs a dense base; leave it out of --arms with --quantize")
        if bad := sorted(set(self.what) - {"train_step", "memory"}):
            raise UserError(f"{', '.join(bad)}: measured on dense bases only; with --quantize give --what train_step memory")

    def torch_device(self):
        """The device that `device` means here."""
        import torch

        present = torch.cuda.is_available()
        if self.device == "cuda" and not present:
            raise UserError("--device cuda, but PyTorch sees no CUDA device; use --device cpu")
        return torch.device("cuda" if present and self.device != "cpu" else "cpu")
