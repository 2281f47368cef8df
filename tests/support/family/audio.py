"""Models that hear: Qwen2-Audio, Voxtral, and the thinkers of Qwen2.5-Omni and Qwen3-Omni."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from support.family.base import END, ENDS, IDS, IMAGE, LONG, START, TOWER, VIDEO, Media
from support.family.llava import llama
from support.family.qwen import Qwen2VL, text_config

AUDIO, BINS = 155, 8


class Qwen2Audio(Qwen2VL):
    """Clips of one length; every fourth frame of the spectrogram becomes a token."""

    name = "qwen2_audio"
    architecture = "Qwen2AudioForConditionalGeneration"
    mrope = False

    def config(self) -> Any:
        return transformers.Qwen2AudioConfig(
            text_config=transformers.Qwen2Config(**LONG),
            audio_config=transformers.Qwen2AudioEncoderConfig(
                d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=48,
                num_mel_bins=BINS, max_source_positions=24,
            ),
            audio_token_index=AUDIO, audio_token_id=AUDIO,
        )  # fmt: skip

    def audio(self, tokens: int = 12) -> Media:
        mask = torch.zeros(1, 48, dtype=torch.long)
        mask[:, : 4 * tokens] = 1
        inputs = {"input_features": torch.randn(1, BINS, 48), "feature_attention_mask": mask}
        return Media([START, *[AUDIO] * tokens, END], inputs)


class Voxtral(Qwen2Audio):
    """Llama behind a Whisper encoder, whose frames are joined by fours."""

    name = "voxtral"
    architecture = "VoxtralForConditionalGeneration"

    def config(self) -> Any:
        return transformers.VoxtralConfig(
            text_config=llama().to_dict(),
            audio_config=dict(
                hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128,
                num_mel_bins=BINS, max_source_positions=48,
            ),
            audio_token_id=AUDIO,
        )  # fmt: skip

    def audio(self, tokens: int = 12) -> Media:
        return Media([AUDIO] * 12, {"input_features": torch.randn(1, BINS, 96)})


class Qwen25OmniThinker(Qwen2VL):
    """Images, videos and clips in one prompt."""

    name = "qwen2_5_omni_thinker"
    architecture = "Qwen2_5OmniThinkerForConditionalGeneration"

    def config(self) -> Any:
        return transformers.Qwen2_5OmniThinkerConfig(
            text_config=text_config(),
            vision_config=dict(TOWER, window_size=16, fullatt_block_indexes=[1]),
            audio_config=dict(
                d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=48,
                num_mel_bins=BINS, max_source_positions=64, n_window=12, output_dim=64,
            ),
            image_token_index=IMAGE, video_token_index=VIDEO, audio_token_index=AUDIO,
            audio_token_id=AUDIO, **IDS, **ENDS, audio_start_token_id=156,
            audio_end_token_id=157, position_id_per_seconds=2, seconds_per_chunk=2,
        )  # fmt: skip

    def positions(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return model.model.get_rope_index(
            inputs["input_ids"],
            inputs.get("image_grid_thw"),
            inputs.get("video_grid_thw"),
            inputs["attention_mask"],
            False,
            None,
            inputs.get("video_second_per_grid"),
        )[0]

    def video(self, frames: int = 4) -> Media:
        return self.whole_video(frames)

    def whole_video(self, frames: int) -> Media:
        media = self._media((frames // 2, 4, 8), VIDEO, "video")
        media.inputs["video_second_per_grid"] = torch.tensor([1.0])
        return media

    def audio(self, tokens: int = 12) -> Media:
        mask = torch.zeros(1, 64, dtype=torch.long)
        mask[:, : 4 * tokens] = 1
        inputs = {"input_features": torch.randn(1, BINS, 64), "feature_attention_mask": mask}
        return Media([156, *[AUDIO] * tokens, 157], inputs)


class Qwen3OmniThinker(Qwen25OmniThinker):
    """Experts, deepstack features, and clips whose frames become tokens in chunks."""

    name = "qwen3_omni_moe_thinker"
    architecture = "Qwen3OmniMoeThinkerForConditionalGeneration"

    def config(self) -> Any:
        section = {"mrope_section": [2, 3, 3], "mrope_interleaved": True}
        return transformers.Qwen3OmniMoeThinkerConfig(
            text_config={
                **text_config(), "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **section},
            },
            vision_config=dict(
                TOWER, depth=3, num_position_embeddings=64, deepstack_visual_indexes=[0],
            ),
            audio_config=dict(
                d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=48,
                num_mel_bins=BINS, max_source_positions=64, n_window=50, n_window_infer=100,
                output_dim=64, downsample_hidden_size=16,
            ),
            audio_token_id=AUDIO, **IDS, **ENDS, audio_start_token_id=156,
            audio_end_token_id=157, position_id_per_seconds=2,
        )  # fmt: skip

    def audio(self, tokens: int = 12) -> Media:
        mask = torch.zeros(1, 96, dtype=torch.long)
        mask[:, : 8 * tokens] = 1
        inputs = {"input_features": torch.randn(1, BINS, 96), "feature_attention_mask": mask}
        return Media([156, *[AUDIO] * tokens, 157], inputs)
