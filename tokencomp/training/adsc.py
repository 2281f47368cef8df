"""Training of ADSC: a LoRA adapter for a decoder that drops tokens between layers."""

from __future__ import annotations

import re
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokencomp
from tokencomp.adapters.registry import adapter_for
from tokencomp.errors import MissingDependencyError, install
from tokencomp.evaluation.settings import Setting
from tokencomp.plan.counts import parse_ratio
from tokencomp.reducers.registry import make_reducer
from tokencomp.storage import write_json
from tokencomp.trained.cards import model_card
from tokencomp.training.checks import without_patch
from tokencomp.training.data import questions
from tokencomp.training.loop import Loop, LoopConfig, answer_loss
from tokencomp.training.measure import accuracy

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CARD = "tokencomp.json"
FILES = ("adapter_model.safetensors", "adapter_config.json")


@dataclass(frozen=True)
class AdscConfig(LoopConfig):
    """Settings of `tokencomp train adsc` beyond those of the loop.

    `schedule` has phases of equal length, each a ratio, or several that take turns: "0.5|0.67|0.8".
    Mild to harsh and harsh to mild (the reverse curriculum of arXiv 2602.12618) are both lists. "0"
    trains the uncompressed model.
    """

    schedule: tuple[str, ...] = ("0.8", "0.67", "0.5", "0|0.5|0.67|0.8")
    reducer: str = "adsc"  # in force while training, with its options; any reducer works
    options: dict[str, Any] = field(default_factory=dict)
    rank: int = 16  # of LoRA
    alpha: int = 32  # of LoRA
    dropout: float = 0.0  # of LoRA
    ratios: tuple[float, ...] = (0.0, 0.67, 0.8)  # evaluated at the end

    def __post_init__(self) -> None:
        super().__post_init__()
        self.phases()
        make_reducer(self.reducer, **self.options)

    def phases(self) -> list[list[float]]:
        """Ratios of every phase, checked."""
        return [[parse_ratio(r) for r in phase.split("|")] for phase in self.schedule]

    def ratio_at(self, step: int) -> float:
        """Ratio of one step."""
        phases = self.phases()
        phase = phases[min(len(phases) - 1, step * len(phases) // max(1, self.steps))]
        return phase[step % len(phase)]


@without_patch
def train_adsc(model: Any, processor: Any, data: str, output: Path, config: AdscConfig) -> Any:
    """Fine-tune LoRA on the decoder with the reducer active; save it as a PEFT adapter.

    The vision tower, projector and embeddings stay frozen. `output` then loads with
    `peft.PeftModel.from_pretrained(model, output)`.

    Returns the PEFT model, in evaluation mode. PEFT puts its layers into `model` itself; `unload()`
    takes them out again, which also happens to a model whose training ends in an error:
    `OptionError` for data without answers or media, or a checkpoint of another run in `output`,
    `ScoreError` if training diverged, `MissingDependencyError` without PEFT.
    """
    card = {**model_card(model), "kind": "adsc", "data": data, "config": asdict(config)}
    source = questions(data, config.kind, config.samples)
    tuned = add_lora(model, config)
    try:
        first = config.ratio_at(0)
        with tokencomp.patch(tuned, first, reducer=config.reducer, **config.options) as handle:

            def loss(inputs: dict[str, Any], labels: Tensor) -> Tensor:
                handle.set(ratio=config.ratio_at(loop.step))
                return answer_loss(tuned, inputs, labels)

            loop = Loop(tuned, processor, tuned, source, config, output, card, loss)
            tuned.train()
            loop.run()
            tuned.eval()
        output.mkdir(parents=True, exist_ok=True)
        tuned.peft_config["default"].base_model_name_or_path = card["model_id"]
        with tempfile.TemporaryDirectory(dir=output) as folder:  # so that files are whole
            tuned.save_pretrained(folder, save_embedding_layers=False)
            for name in FILES:
                (Path(folder) / name).replace(output / name)
        card |= loop.report()
        write_json(output / CARD, card)
        if config.evaluate:
            held_out = questions(data, config.kind, config.evaluate, "validation")
            variants = {"": tuned, "tuned": tuned}
            card["accuracy"] = accuracy(variants, processor, held_out, comparison(config), config)
            write_json(output / CARD, card)
    except BaseException:
        tuned.unload()
        raise
    return tuned


def add_lora(model: Any, config: AdscConfig) -> Any:
    """`model` with a fresh LoRA adapter on the linear layers of its decoder blocks."""
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError(f"adapters need PEFT: {install('train')}.") from error
    adapter = adapter_for(model)
    named = adapter.model.named_modules()
    prefix = next(name for name, module in named if module is adapter.decoder)
    targets = rf"{re.escape(prefix)}\.layers\.\d+\.\w+\.({'|'.join(TARGETS)})"
    torch.manual_seed(config.seed)
    lora = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets
    )
    return peft.get_peft_model(model, lora)


def comparison(config: AdscConfig, variant: str = "tuned") -> list[Setting]:
    """Trained, training-free and random at every ratio; at 0 only the trained adapter."""
    settings = []
    for ratio in config.ratios:
        method = (config.reducer, ratio, config.options)
        settings.append(Setting(*method, name="trained", variant=variant))
        if ratio > 0:
            settings += [Setting(*method, name="training-free"), Setting("random", ratio)]
    return settings
