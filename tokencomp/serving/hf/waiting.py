"""Requests that wait for the engine, and the batches that they form."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from tokencomp.serving.hf.errors import RequestError
from tokencomp.serving.hf.job import Job


@dataclass
class Waiting:
    """The queue of the engine; whoever changes it holds the engine's lock.

    Attributes
    ----------
    max_batch, max_batch_pixels
        Requests per batch, and pixels of their media, because the arrays of a processor take about
        24 bytes per pixel.
    max_waiting, max_waiting_pixels
        Requests in the queue, and pixels of their media, before new ones are refused with 503.
    jobs
        The requests, oldest first.
    """

    max_batch: int = 8
    max_batch_pixels: int = 100_000_000
    max_waiting: int = 256
    max_waiting_pixels: int = 1_000_000_000
    jobs: deque[Job] = field(default_factory=deque)

    def __len__(self) -> int:
        return len(self.jobs)

    def check_room(self, pixels: int = 0, count: int = 1) -> None:
        """Raise `RequestError` (503) when full with `count` more requests of so many pixels."""
        waiting = sum(job.prompt.pixels for job in list(self.jobs))
        full = len(self.jobs) + count > self.max_waiting
        if full or (waiting and waiting + pixels > self.max_waiting_pixels):
            raise RequestError("the server is busy; try again later.", 503)

    def take(self) -> list[Job]:
        """Take the oldest request and those with equal options, up to the size of a batch.

        Requests whose clients have left are dropped.
        """
        waiting = [job for job in self.jobs if not job.cancelled]
        batch: list[Job] = []
        pixels = 0
        for job in (j for j in waiting if j.group == waiting[0].group):
            pixels += job.prompt.pixels
            if batch and (len(batch) == self.max_batch or pixels > self.max_batch_pixels):
                break
            batch.append(job)
        self.jobs = deque(j for j in waiting if j not in batch)
        return batch
