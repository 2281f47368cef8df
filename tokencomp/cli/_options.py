"""Options that several commands share, and checks of them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from tokencomp.errors import OptionError
from tokencomp.inputs.packaged import DEFAULT_MODEL
from tokencomp.plan.options import OPTIONS, StageOptions, type_of
from tokencomp.validation import choices

FIRST = ("model", "data", "image", "video", "question", "reducer", "ratio", "budget")
"""What most users give; the help of a command begins with it."""
Model = Annotated[
    str, typer.Option("--model", "-m", help="Embedded model, local folder, or hub id.")
]
Question = Annotated[str, typer.Option("--question", "-q", help="What to ask.")]
Reducers = Annotated[
    str,
    typer.Option(
        "--reducer",
        "-r",
        help="Reducers, separated by commas (tokencomp list), with options in brackets as in "
        "'condiv(power=2),kcenter'. In demo, eval, inspect and profile "
        "all: every one that fits the model.",
    ),
]
Frames = Annotated[
    str,
    typer.Option(
        "--frames",
        help='Frames of a video: 8 (evenly spaced), "1fps", "stream:8" (by bursts of the file), '
        '"scorer:aks:8" or "scorer:focus:8" (by the model\'s own embeddings).',
    ),
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Rows per batch.")]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")
]
Device = Annotated[str, typer.Option("--device", help='"auto", "cpu", "cuda", "cuda:1", ...')]
Dtype = Annotated[str, typer.Option("--dtype", help='"auto", float32, bfloat16, float16.')]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="TOKENCOMP_API_KEY",
        help="Bearer token that requests need. On the command line, all users of this machine "
        "can read it (ps); the environment variable hides it.",
    ),
]
RouterKey = Annotated[
    str | None,
    typer.Option(
        "--router-key",
        envvar="TOKENCOMP_ROUTER_KEY",
        help="Secret of router, prefill and decode: with it a router sends kv_transfer_params "
        "and ec_transfer_params to vLLM. Without it, nobody may. Better in the variable.",
    ),
]
AllowedHost = Annotated[
    list[str] | None,
    typer.Option(
        "--allowed-host",
        help="Name that clients may use for this server, besides localhost and numeric "
        "addresses; repeatable. By default any, except at 127.0.0.1.",
    ),
]
ShutdownTimeout = Annotated[
    int,
    typer.Option(
        "--shutdown-timeout", min=0, help="Seconds that running requests have after SIGTERM."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@dataclasses.dataclass(frozen=True)
class StageFlags(StageOptions):
    """The options of stages, and the stage in the vision tower."""

    tower_ratio: Annotated[
        str,
        typer.Option(
            "--tower-ratio",
            help='Share of the vision tower to remove, from 0 (off) to the ratio; or "auto".',
        ),
    ] = "0"
    tower_reducer: Annotated[
        str, typer.Option("--tower-reducer", help="What chooses the patches that the tower sees.")
    ] = "auto"

    @property
    def stages(self) -> dict[str, Any]:
        """As options of a setting; empty for the defaults."""
        ratio: Any = self.tower_ratio
        with contextlib.suppress(ValueError):  # `Method` checks it
            ratio = float(ratio)
        amount = {} if ratio == 0.0 else {"tower_ratio": ratio}
        reducer = {} if self.tower_reducer == "auto" else {"tower_reducer": self.tower_reducer}
        return {**self.given_options, **amount, **reducer}


@dataclasses.dataclass(frozen=True)
class MethodOptions(StageFlags):
    """Reducers at ratios, or a plan."""

    reducer: Reducers = "auto"
    ratio: Annotated[
        str,
        typer.Option(
            "--ratio",
            help="Ratios in [0, 1), separated by commas; 0 = off. Or one per modality, such as "
            "video=0.75,audio=0.5; several of these are separated by semicolons.",
        ),
    ] = "0.5,0.75,0.9"
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            help="In place of --ratio: visual tokens kept of every image or clip, separated by "
            "commas; prompt=4096: of all media of a prompt together.",
        ),
    ] = None
    speedup: Annotated[
        str | None,
        typer.Option(
            "--speedup",
            help="In place of --ratio: factors by which the work of tower and decoder falls, "
            "separated by commas, such as 1.5,2.",
        ),
    ] = None
    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan", help="JSON file with explicit stages, instead of --reducer and --ratio."
        ),
    ] = None


@dataclasses.dataclass(frozen=True)
class Source:
    """The model."""

    model: Model = DEFAULT_MODEL
    device: Device = "auto"
    dtype: Dtype = "auto"
    image_max_tokens: Annotated[
        int | None,
        typer.Option(
            "--image-max-tokens",
            min=1,
            help="Scale larger images down to this many tokens before the vision tower (Qwen-VL, "
            "GLM-V, Gemma 4, ...), and then compress; six times --budget, not for documents.",
        ),
    ] = None

    @functools.cached_property
    def loaded(self) -> tuple[Any, Any]:
        """Model and processor, loaded on first use."""
        from tokencomp.inputs.loading import load_model

        return load_model(
            self.model, device=self.device, dtype=self.dtype, image_max_tokens=self.image_max_tokens
        )


@dataclasses.dataclass(frozen=True)
class Files:
    """Media, and the question about them."""

    image: Annotated[
        list[Path] | None, typer.Option("--image", "-i", help="Image file; may be repeated.")
    ] = None
    video: Annotated[
        list[Path] | None, typer.Option("--video", "-v", help="Video file; may be repeated.")
    ] = None
    question: Question = "Describe what you see."
    frames: Frames = "8"

    @property
    def label(self) -> str:
        return ", ".join(path.name for path in [*(self.image or ()), *(self.video or ())])

    def load(self, source: Source) -> list[Any]:
        """PIL images, and lists of them for videos; the model of `source` may score frames."""
        from tokencomp.inputs.media import load_media
        from tokencomp.inputs.video import Video
        from tokencomp.inputs.video.frames import Frames as Policies
        from tokencomp.inputs.video.frames import Scored, frame_policy
        from tokencomp.inputs.video.scorer import with_scorer

        if not (self.image or self.video):
            raise OptionError("nothing to look at: give --image FILE or --video FILE.")
        frames: Policies = frame_policy(self.frames)
        if isinstance(frames, Scored):
            frames = with_scorer(frames, *source.loaded)
        loaded = [load_media(path, frames, question=self.question) for path in self.image or ()]
        for path in self.video or ():
            media = load_media(path, frames, question=self.question)
            if not isinstance(media, Video):
                raise OptionError(f"--video {path} is a picture. Give it as --image {path}.")
            loaded.append(media)
        return loaded


def stage_flags() -> dict[str, Any]:
    """The options of stages as parameters of typer; True and False are the words on and off."""
    flags = {}
    for name, known in OPTIONS.items():
        kind = type_of(name)
        words = ["on", "off"] if kind is bool or bool in get_args(kind) else []
        words += choices(kind)
        given = typer.Option(
            f"--{name.replace('_', '-')}",
            help=known.help, parser=_value if words else None, metavar="|".join(words) or None,
        )  # fmt: skip
        flags[name] = Annotated[str if words else kind, given]
    return flags


def _value(text: str) -> Any:
    """The value of a word on the command line; `StageOptions.check_options` refuses other words.

    Its message names values as in Python, so that these are words as well.
    """
    return {"on": True, "off": False, "True": True, "False": False}.get(text, text)


def flat(command: Any = None, /, **defaults: Any) -> Any:
    """Decorate `command` for typer: every field of a dataclass parameter becomes an option.

    So shared options are declared once. `defaults` are those of this command.
    """
    if command is None:
        return functools.partial(flat, **defaults)
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {
        name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)
    }
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name]))
            continue
        kinds = get_type_hints(groups[name], include_extras=True) | stage_flags()
        fields = inspect.signature(groups[name]).parameters.values()
        parameters += [
            field.replace(
                annotation=kinds[field.name], default=defaults.get(field.name, field.default)
            )
            for field in fields
        ]

    def call(**values: Any) -> None:
        for name, kind in groups.items():
            taken = {field.name: values.pop(field.name) for field in dataclasses.fields(kind)}
            values[name] = kind(**taken)
        command(**values)

    parameters.sort(key=lambda p: FIRST.index(p.name) if p.name in FIRST else len(FIRST))
    options = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    call.__name__, call.__doc__ = command.__name__, command.__doc__
    call.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]  # functions may have one
    call.__annotations__ = {p.name: p.annotation for p in options}
    return call


def given(context: typer.Context, options: Sequence[str]) -> list[str]:
    """Flags of the parameters among `options` that the command line names."""
    flags = {str(p.name): p.opts[0] for p in context.command.params}
    sources = {name: getattr(context.get_parameter_source(name), "name", "") for name in options}
    return [flags[name] for name in options if sources[name] == "COMMANDLINE"]


def refuse_options(context: typer.Context, options: Sequence[str], where: str, fix: str) -> None:
    """Raise `OptionError` for given parameters that have no effect with `where`."""
    if useless := given(context, options):
        raise OptionError(f"{', '.join(useless)}: no effect with {where}; {fix}.")
