"""The times of frames reach the processor: against the processor called by hand."""

import base64
import warnings

import numpy as np
import pytest
import torch
from support.trained import tiny

from tokencomp.errors import FrameRateWarning
from tokencomp.evaluation.baselines import EqualTokens
from tokencomp.inputs import media
from tokencomp.inputs.prompts import build_inputs, chat_inputs, media_chat
from tokencomp.inputs.video import Video
from tokencomp.inputs.video.frame_times import frame_times
from tokencomp.serving.limits import Limits
from tokencomp.serving.video import load_video
from tokencomp.zoo.shapesqa.items import item
from tokencomp.zoo.shapesqa.render import write_mp4

FPS, FRAMES, QUESTION = 5, 6, "What shape appears first?"


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("qwen3"), name="tiny-qwen3-vl")[1]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    scene = item("validation", "order", 3).scene
    return write_mp4(scene, tmp_path_factory.mktemp("clip") / "clip.mp4", fps=FPS)


def by_hand(processor, path):
    """What a user of transformers gets who decodes the file and says which frames these are."""
    av = pytest.importorskip("av")
    from transformers.video_utils import VideoMetadata

    with av.open(str(path)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    indices = [int((k + 0.5) * len(every) / FRAMES) for k in range(FRAMES)]
    known = VideoMetadata(
        total_num_frames=len(every),
        fps=FPS,
        duration=len(every) / FPS,
        frames_indices=indices,
    )
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    frames = np.stack([every[i] for i in indices])
    more = {"video_metadata": [known], "do_sample_frames": False, "return_tensors": "pt"}
    return processor(text=[text], videos=[frames], **more), indices


def assert_same(ours, theirs):
    for name, value in theirs.items():
        close = value.shape == ours[name].shape and torch.allclose(
            value.float(),
            ours[name].float(),
            atol=0.06,  # decoders round colours differently
        )
        assert close, name
    assert torch.equal(ours["input_ids"], theirs["input_ids"])


def test_files_are_stamped_with_their_own_times(processor, clip):
    theirs, indices = by_hand(processor, clip)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FrameRateWarning)
        ours = build_inputs(processor, [[media.load_media(clip, FRAMES)]], [QUESTION])
    assert_same(ours, theirs)
    text = processor.tokenizer.decode(ours["input_ids"][0])
    for a, b in zip(indices[::2], indices[1::2], strict=True):
        assert f"<{(a + b) / 2 / FPS:.1f} seconds>" in text


def test_the_server_says_the_same_as_a_file(processor, clip):
    url = "data:video/mp4;base64," + base64.b64encode(clip.read_bytes()).decode()
    frames, sampling = load_video(url, Limits(frames=FRAMES))
    chat = media_chat([frames], QUESTION)
    ours = chat_inputs(processor, [chat], [], [frames], [sampling])
    assert_same(ours, by_hand(processor, clip)[0])


def test_a_single_frame_is_shown_twice_at_its_time(processor, clip):
    from transformers.video_utils import VideoMetadata

    (frame,) = media.load_media(clip, 1)
    times = frame_times(processor, [Video([frame], FPS, indices=[13]).sampling])
    assert times["video_metadata"][0]["frames_indices"] == [13, 13]  # one for every frame shown
    ours = build_inputs(processor, [[Video([frame], FPS, indices=[13])]], [QUESTION])
    known = VideoMetadata(total_num_frames=14, fps=FPS, frames_indices=[13, 13])
    text = processor.apply_chat_template(
        media_chat([[frame]], QUESTION), add_generation_prompt=True, tokenize=False
    )
    more = {"video_metadata": [known], "do_sample_frames": False, "return_tensors": "pt"}
    assert_same(ours, processor(text=[text], videos=[np.stack([frame, frame])], **more))
    assert f"<{13 / FPS:.1f} seconds>" in processor.tokenizer.decode(ours["input_ids"][0])


def test_lists_without_a_rate_are_warned_about(processor, clip):
    frames = [*media.load_media(clip, FRAMES)]
    with pytest.warns(FrameRateWarning, match=r"Video\(frames, fps=\.\.\.\)"):
        ours = build_inputs(processor, [[frames]], [QUESTION])
    text = processor.apply_chat_template(media_chat([frames], QUESTION), tokenize=False)
    text += "<|im_start|>assistant\n"
    array = np.stack([np.asarray(frame) for frame in frames])
    default = processor(text=[text], videos=[array], do_sample_frames=False, return_tensors="pt")
    assert torch.equal(ours["input_ids"], default["input_ids"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", FrameRateWarning)
        rated = build_inputs(processor, [[Video(frames, 2.0)]], [QUESTION])
    assert "<0.2 seconds>" in processor.tokenizer.decode(rated["input_ids"][0])


def test_processors_that_read_no_times_get_none(tmp_path, clip):
    """And no warning where the rate is unknown."""
    plain = tiny(tmp_path, name="tiny-qwen2-vl")[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FrameRateWarning)
        assert frame_times(plain, [Video([*media.load_media(clip, FRAMES)], None).sampling]) == {}


def test_shrunk_videos_keep_their_times(processor, clip):
    video = media.load_media(clip, 8)
    shrink = EqualTokens(processor, [processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")],
                         "fewer_frames").shrink  # fmt: skip
    fewer = shrink(video, 0.5)
    assert [video.sampling.indices[i] for i in (1, 3, 5, 7)] == [*fewer.sampling.indices]
    assert fewer.sampling.fps == FPS and fewer.sampling.total == 32
