"""BenchSettings: what `doratune bench` measures, on which model, arms and sizes; one name for a setting and its flag."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field

from ..errors import UserError, listed, near_misses

ARMS = ("frozen", "lora", "dora", "lora_peft", "dora_peft", "dora_dense")
MEASUREMENTS = ("train_step", "decode", "memory", "norm", "layer", "sizes", "host")
TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


@dataclass(kw_only=True)
class BenchSettings:
    """Time and memory of every way to train the same adapter, interleaved in one process; one JSON a measurement.

    Args:
        what: train_step, decode, memory, norm, layer, sizes, host
        arms: frozen, lora, dora, lora_peft, dora_peft, dora_dense
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
        threads: train_step and decode are measured with each; 0: as many as the machine gives; 1: into files of their own
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

    what: list[str] = field(default_factory=lambda: list(MEASUREMENTS))
    arms: list[str] = field(default_factory=lambda: list(ARMS))
    model: str = "smollm2-135m-instruct"
    quantize: str = "none"
    targets: list[str] = field(default_factory=lambda: list(TARGETS))
    ranks: list[int] = field(default_factory=lambda: [16, 64])
    dtypes: list[str] = field(default_factory=lambda: ["float32", "bfloat16"])
    batch_size: int = 4
    length: int = 256
    accumulation: int = 8
    new_tokens: int = 64
    rounds: int = 20
    warm_up: int = 3
    threads: list[int] = field(default_factory=lambda: [0])
    tokens: int = 512
    layer_sizes: list[int] = field(default_factory=lambda: [2048, 4096])
    hidden_sizes: list[int] = field(default_factory=lambda: [512, 1024, 2048, 4096])
    size_ranks: list[int] = field(default_factory=lambda: [4, 16, 64, 256, 512])
    norm_size: int = 8192
    norm_rank: int = 384
    host_layers: int = 24
    host_width: int = 64
    host_tokens: int = 4
    host_rank: int = 8
    host_rounds: int = 250
    attach_layers: int = 200
    device: str = "auto"
    kernel: str = "auto"
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
        for what in self.what:
            _known("measurement", what, MEASUREMENTS)
        _known("device", self.device, ("auto", "cpu", "cuda"))
        self._check_numbers()
        from ..layers import passes
        from ..support.models import torch_dtype

        self._check_arms()
        self._check_quantized()
        for dtype in self.dtypes:
            torch_dtype(dtype)
        self.torch_device()
        passes.use(self.kernel)
        return self

    def _check_arms(self) -> None:
        for name in self.arms:
            if name not in ARMS:
                raise UserError(f"unknown arm {name!r}{near_misses(name, ARMS)}; arms are {listed(ARMS)}")
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

    def _check_numbers(self) -> None:
        whole = ["batch_size", "length", "accumulation", "new_tokens", "rounds", "tokens", "norm_size", "norm_rank"]
        whole += ["host_layers", "host_width", "host_tokens", "host_rank", "host_rounds", "attach_layers"]
        for name in whole + ["ranks", "layer_sizes", "hidden_sizes", "size_ranks"]:
            value = getattr(self, name)
            for number in value if isinstance(value, list) else [value]:
                if number < 1:
                    raise UserError(f"{name} is {number}; expected a whole number of at least 1")
        if min(self.threads) < 0:
            raise UserError(f"threads is {min(self.threads)}; expected 0, for as many as the machine gives, or a number of threads")
        if self.warm_up < 0:
            raise UserError(f"warm_up is {self.warm_up}; expected 0 or more")
        if self.length < 2:
            raise UserError(f"length is {self.length}; expected at least 2, since each token is predicted from those before it")

    def torch_device(self):
        """The device that `device` means here."""
        import torch

        present = torch.cuda.is_available()
        if self.device == "cuda" and not present:
            raise UserError("--device cuda, but PyTorch sees no CUDA device; use --device cpu")
        return torch.device("cuda" if present and self.device != "cpu" else "cpu")


def _known(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"unknown {what} {value!r}{near_misses(value, known)}; expected {', '.join(known)}")
