"""The page of `tokencomp play`: one prompt with and without compression, side by side."""

from __future__ import annotations

import os
from typing import Any

from tokencomp.cli._demo import packaged_questions
from tokencomp.cli._showcase import answer_prompt, prompt, time_prefill
from tokencomp.errors import TokenCompError
from tokencomp.evaluation.environment import public_name
from tokencomp.evaluation.settings import Setting
from tokencomp.evaluation.timing import Split
from tokencomp.inputs.media import load_media
from tokencomp.inputs.packaged import zoo_folder
from tokencomp.inputs.video.frames import Frames
from tokencomp.inputs.video.scorer import with_scorer
from tokencomp.pages.html import compact
from tokencomp.pages.pictures import plain_tiles, strip
from tokencomp.plan.options import Merging
from tokencomp.reducers.registry import available_reducers

HEAD = ("", "without", "with compression")
TIMING_SECONDS = 2.0
CHOICES: dict[str, Merging | None] = {"as usual": None, "merge": True, "drop": False}
LABEL = "Dropped tokens (usually auto merges those of pictures, other methods drop them)"
NOTHING = "Drop a picture or a clip first."


class Playground:
    """Answers one question about one file under one setting."""

    def __init__(self, model: Any, processor: Any, name: str, frames: Frames) -> None:
        self.model, self.processor = model, processor
        self.frames = with_scorer(frames, model, processor)
        self.title = f"tokencomp: what {public_name(name)} sees"
        self.methods = ["auto", *available_reducers()]

    def ask(
        self,
        image: str | None,
        video: str | None,
        question: str,
        method: str,
        ratio: float,
        tower_ratio: float,
        merge: str,
    ) -> tuple[str, str, list[list[str]], list[Any]]:
        """Both answers, a table of their costs, and pictures of what the model sees."""
        paths = [path for path in (image, video) if path]
        if not paths:
            raise TokenCompError(NOTHING)
        media = [load_media(path, self.frames, question=question) for path in paths]
        setting = Setting(method, ratio, tower_ratio=tower_ratio, merge=CHOICES[merge])
        settings, row = [Setting(), setting], prompt(media, question)
        full, own = answer_prompt(self.model, self.processor, row, settings)
        times = time_prefill(self.model, self.processor, [row], settings, TIMING_SECONDS)
        pictures = [(strip(plain_tiles(m)), "all patches") for m in media]
        pictures += [(picture, "on average over the layers") for picture in own.pictures]
        for layer, sheets in own.layers if len(own.layers) > 1 else ():
            pictures += [(sheet, f"from layer {layer} on") for sheet in sheets]
        return full.text, own.text, _table(full, own, times), pictures


def _table(full: Any, own: Any, times: dict[Setting, Split]) -> list[list[str]]:
    """One row per cost: its name, without, and with compression."""
    kept = own.cost.kv_bytes / full.cost.kv_bytes
    first, second = (times[answer.setting] for answer in (full, own))
    return [
        ["visual tokens", compact(full.cost.per_layer), compact(own.cost.per_layer)],
        ["work of the LLM", "100%", f"{own.cost.flops / full.cost.flops:.0%}"],
        ["KV cache", "100%", f"{kept:.0%}"],
        ["first token, seconds", f"{first.total:.3f}", f"{second.total:.3f}"],
    ]


def build(play: Playground) -> Any:
    """The page as Gradio blocks."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio as gr

    def ask(*values: Any) -> Any:
        try:
            return play.ask(*values)
        except TokenCompError as error:
            raise gr.Error(str(error), duration=None) from None

    with gr.Blocks(title=play.title, analytics_enabled=False) as page:
        gr.Markdown(f"## {play.title}")
        with gr.Row():
            with gr.Column():
                image = gr.Image(type="filepath", label="Picture")
                video = gr.Video(label="Clip")
                question = gr.Textbox("Describe what you see.", label="Question")
                method = gr.Dropdown(play.methods, value="auto", label="Method")
                ratio = gr.Slider(
                    0,
                    0.95,
                    0.75,
                    step=0.05,
                    label="Ratio of visual tokens that are dropped or merged",
                )
                tower = gr.Slider(
                    0, 0.95, 0, step=0.05, label="Ratio dropped before the vision tower"
                )
                merge = gr.Radio(list(CHOICES), value=next(iter(CHOICES)), label=LABEL)
                button = gr.Button("Ask", variant="primary")
            with gr.Column(scale=2):
                with gr.Row():
                    full = gr.Textbox(label="Answer without compression")
                    own = gr.Textbox(label="Answer with compression")
                costs = gr.Dataframe(headers=list(HEAD), label="Cost", interactive=False)
                pictures = gr.Gallery(label="What the model sees", columns=2, object_fit="contain")
        inputs = [image, video, question, method, ratio, tower, merge]
        button.click(ask, inputs, [full, own, costs, pictures])
        if rows := _samples():
            gr.Examples(rows, [image, video, question], label="Embedded samples")
    return page


def _samples() -> list[list[str | None]]:
    """Picture, clip and question of the embedded samples; empty if they are not installed."""
    rows: list[list[str | None]] = []
    for example in packaged_questions() if zoo_folder() is not None else ():
        path = example.media[0]
        own = [str(path), None] if path.suffix == ".jpg" else [None, str(path)]
        rows.append([*own, example.prompt])
    return rows


def serve(play: Playground, host: str, port: int, browser: bool) -> None:
    """Serve the page until the process is interrupted."""
    folder = zoo_folder()
    allowed = [] if folder is None else [str(folder / "samples")]
    build(play).queue(default_concurrency_limit=1).launch(
        server_name=host,
        server_port=port or None,
        inbrowser=browser,
        share=False,
        allowed_paths=allowed,
        show_error=True,
    )
