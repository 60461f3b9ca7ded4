"""How answers read on one line, for people."""

from __future__ import annotations

from diapause.model import CaptureAnswer, ResumeAnswer
from diapause.units import format_size


def capture_line(verb: str, answer: CaptureAnswer) -> str:
    """What a pause or a save did."""
    if answer.already:
        return f"{answer.sandbox} was {verb} already; snapshot {answer.snapshot}"
    return (
        f"{verb} {answer.sandbox}: frozen {answer.frozen_ms:.1f} ms,"
        f" {answer.dirty_pages} dirty pages ({answer.dirty_source}),"
        f" {format_size(answer.captured_bytes)} captured, durable to {answer.durability};"
        f" snapshot {answer.snapshot}"
    )


def resume_line(answer: ResumeAnswer) -> str:
    """What a resume did."""
    if answer.already:
        return f"{answer.sandbox} ran already"
    if not answer.warm:
        disk = "its own disk" if answer.disk == "own" else f"the disk of {answer.snapshot}"
        return f"booted {answer.sandbox}: cold, ready in {answer.ready_ms:.1f} ms on {disk}"
    ready = f"ready in {answer.ready_ms:.1f} ms from {answer.source}"
    return f"resumed {answer.sandbox}: warm, {ready}"
