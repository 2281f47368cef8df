"""Video files with PyAV: their packets are listed first, and only chosen frames are decoded."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from tokencomp.errors import MediaError
from tokencomp.inputs.video.packets import ClipIndex, Packets, index_of, missing, packets_of

SKIPS = frozenset(["h264", "hevc", "mpeg4", "mpeg2video", "mpeg1video"])
"""Decoders that leave out a frame where its packet asks for it, and decode all others."""


class VideoFile(contextlib.AbstractContextManager["VideoFile"]):
    """The frames of a video file.

    `opened` opens it, and is called again if the file is not seekable; `threads` and `options` are
    for the decoder. `watch` is called without an argument for every packet, and with every decoded
    frame, and may raise. With `strict`, decoder errors are raised; otherwise another frame replaces
    a damaged one. `decoded` counts decoded frames, and `replaced` has the places of damaged ones;
    `width` and `height` are those of the header, and `format` is the container's name.
    """

    def __init__(
        self,
        opened: Callable[[], Any],
        threads: int = 1,
        watch: Callable[..., None] = lambda *frame: None,
        options: dict[str, str] | None = None,
        strict: bool = False,
    ) -> None:
        self._opened, self._threads, self._watch = opened, threads, watch
        self._options, self._strict = options or {}, strict
        self.decoded, self.replaced = 0, set[int]()
        self._open()
        self.width, self.height = self._stream.width or 0, self._stream.height or 0
        self.format = str(self._container.format.name)

    def _open(self) -> None:
        self._container = self._opened()
        if not self._container.streams.video:
            what = "only sound" if self._container.streams.audio else "no video stream"
            self.close()
            raise MediaError(f"the file has {what}. Give a file with pictures.")
        self._stream = self._container.streams.video[0]
        context = self._stream.codec_context
        context.thread_type, context.thread_count = "AUTO", self._threads
        if self._options:
            context.options = self._options

    def close(self) -> None:
        self._container.close()

    def __exit__(self, *_: Any) -> None:
        self.close()

    @cached_property
    def index(self) -> ClipIndex:
        """All frames of the file; decodes only if packets do not give their times."""
        clock, rate = self._stream.time_base, self._stream.average_rate
        seen, timed, read = [], True, 0
        for packet in self._demux():
            read += 1
            timed &= packet.pts is not None
            if not packet.is_discard:
                seen.append((packet.pts or 0, packet.size, packet.is_keyframe))
        if not timed or self._counts_packets([pts for pts, *_ in seen]):
            self._start_again()
            total = sum(1 for _ in self._decode(self._demux()))
            if timed and total == len(seen):
                return replace(index_of(packets_of(seen), clock, rate, self._codec), packets=None)
            return ClipIndex(total, float(rate) if rate else None, None, self._codec)
        if not seen:
            raise MediaError("the file has no frames. Check it with ffprobe.")
        index = index_of(packets_of(seen), clock, rate, self._codec)
        return replace(index, lacking=self._lacking(index, read))

    def _counts_packets(self, pts: Sequence[int]) -> bool:
        """Whether times are numbers of packets although frames are shown in another order.

        AVI stores no times, and FFmpeg finds those of H.264 with B-frames in no other way.
        """
        reordered = self.format == "avi" and self._stream.codec_context.has_b_frames
        return reordered and all(a < b for a, b in itertools.pairwise(pts))

    def _lacking(self, index: ClipIndex, read: int) -> int:
        """Frames that the file should have beyond the `read` ones, by its header or its clock."""
        stream, clock = self._stream, self._stream.time_base
        promised = stream.frames  # 0 where the header does not say
        start = float((stream.start_time or 0) * clock)
        ends = None if stream.duration is None else float(stream.duration * clock)
        if promised and self.format != "avi":  # whose count includes empty frames
            return 0 if _reaches(index.times, ends) else max(promised - read, 0)
        if written := stream.metadata.get("DURATION"):  # Matroska, WebM: 00:01:23.450000000
            hours, minutes, seconds = map(float, written.split(":"))
            ends = 3600 * hours + 60 * minutes + seconds - start
        return missing(index.times, ends)

    def frames(self, places: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Decode the frames at `places`: yields place and `av.VideoFrame`, in no particular order.

        Decoding starts at the key frame before a chosen frame, unless an earlier chosen frame
        shares it; frames in between that no other needs are skipped. In place of a damaged frame
        comes the one shown before it, or after it if there is none.
        """
        if self.index.packets is None:  # without times, all frames are decoded
            self._start_again()
            every = enumerate(self._decode(self._demux()))
            yield from (pair for pair in every if pair[0] in places)
            return
        groups: dict[int, list[int]] = {}
        for place in sorted(places):
            groups.setdefault(int(self._packets.starts[place]), []).append(place)
        for start, wanted in groups.items():
            left = set(wanted)
            for place, frame in self._run(start, wanted):
                if place in left:
                    left.remove(place)
                    yield place, frame
            if left:
                yield from self._stand_ins(start, sorted(left))

    def _stand_ins(self, start: int, left: list[int]) -> Iterator[tuple[int, Any]]:
        """Frames at `left`, or their neighbours, from one key frame earlier than `start`.

        Streams with key frames that are spread over several frames show nothing before the last of
        these is decoded, so the group before may contain what the packets promise.
        """
        shown, before = None, int(self._packets.starts[start - 1]) if start > 0 else -1
        for place, frame in self._run(before, left, all_=True):
            while left and left[0] < place:
                yield self._in_place_of(left.pop(0), frame if shown is None else shown)
            if left and left[0] == place:
                yield left.pop(0), frame
            shown = frame
        for place in left if shown is not None else ():
            yield self._in_place_of(place, shown)

    def _in_place_of(self, place: int, frame: Any) -> tuple[int, Any]:
        """A frame that is shown at the place of a damaged one."""
        self.replaced.add(place)
        return place, frame

    @cached_property
    def _packets(self) -> Packets:
        packets = self.index.packets
        assert packets is not None  # else `frames` decodes the whole file
        return packets

    @cached_property
    def _place_of(self) -> dict[int, int]:
        return {int(pts): place for place, pts in enumerate(self._packets.pts)}

    def _run(
        self, start: int, wanted: Sequence[int], all_: bool = False
    ) -> Iterator[tuple[int, Any]]:
        """Decode from the key frame at `start` (-1: the start of the file) to the last of `wanted`.

        Frames that none of `wanted` needs are skipped, except with `all_`.
        """
        order, pts = self._packets.order, self._packets.pts
        chosen = self._between(start, max(int(order[place]) for place in wanted))
        for frame in self._decode(chosen, None if all_ else {int(pts[p]) for p in wanted}):
            if frame.pts in self._place_of:
                yield self._place_of[frame.pts], frame

    def _between(self, start: int, last: int) -> Iterator[Any]:
        """Packets from the frame at `start` to number `last` in decoding order.

        A start of -1 is that of the file: in a file that was trimmed without encoding it again, the
        key frame of the first frames is not shown.
        """
        order, first = self._packets.order, int(self._packets.order[start])
        for from_start in (start < 0, True):
            self._seek(int(self._packets.pts[start]), from_start)
            reached = start < 0
            for packet in self._demux():
                place = None if packet.is_discard else self._place_of.get(packet.pts)
                number = -1 if place is None else int(order[place])
                if not reached and number > first:
                    break  # the search went too far: read the file from its start
                reached |= number == first
                if reached:
                    yield packet
                if number >= last:
                    return
            if reached:
                return

    def _seek(self, pts: int, from_start: bool) -> None:
        """Seek to a packet at or before `pts`."""
        if not from_start:
            with contextlib.suppress(OSError, ValueError):
                self._container.seek(pts, stream=self._stream)
                return
        self._start_again()

    def _start_again(self) -> None:
        self.close()
        self._open()

    def _demux(self) -> Iterator[Any]:
        """Packets that are not empty, up to the first that cannot be read."""
        packets = self._container.demux(self._stream)
        while True:
            self._watch()
            try:
                packet = next(packets, None)
            except (OSError, ValueError) as error:  # the end of a truncated file
                if not self._bears(error):
                    raise
                return
            if packet is None:
                return
            if packet.size:
                yield packet

    def _decode(self, packets: Iterator[Any], targets: set[int] | None = None) -> Iterator[Any]:
        """Frames of `packets`; with `targets`, frames that no other needs are skipped."""
        context = self._stream.codec_context  # reading packets may open the file again
        for packet in packets:
            context = self._stream.codec_context
            if targets is not None and context.name in SKIPS:
                context.skip_frame = "DEFAULT" if packet.pts in targets else "NONREF"
            yield from self._frames(context, packet)
        yield from self._frames(context, None)

    def _frames(self, context: Any, packet: Any) -> Iterator[Any]:
        try:
            frames = context.decode(packet)
        except (OSError, ValueError) as error:
            if not self._bears(error):
                raise
            return
        for frame in frames:
            self.decoded += 1
            self._watch(frame)
            yield frame

    def _bears(self, error: Exception) -> bool:
        """Whether an error is due to the content of the file, so that another frame can be used."""
        import av

        passing = isinstance(error, MemoryError | BlockingIOError)
        return not self._strict and not passing and isinstance(error, av.error.FFmpegError)

    @property
    def _codec(self) -> str:
        return str(self._stream.codec_context.name)


def _reaches(times: np.ndarray | None, ends: float | None) -> bool:
    """Whether the last frame is shown until the end: a trimmed file counts hidden frames too."""
    if times is None or ends is None or len(times) < 2:
        return False
    return bool(ends - times[-1] < 1.5 * np.median(np.diff(times)))
