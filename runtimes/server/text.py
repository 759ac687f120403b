"""Tokens → text pieces with their log-probabilities, up to the first stop string."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from losa_deploy.text.tokenizer import UNFINISHED, StreamDecoder, Tokenizer

from ..generate import StopScanner
from .engine import EngineToken, FinishReason, Ticket


@dataclass(frozen=True)
class TokenText:
    """One token of a reply, or an alternative to it. `offset`: characters of the reply before it."""

    text: str
    logprob: float
    offset: int = 0
    top: tuple[TokenText, ...] = ()

    @property
    def bytes(self) -> list[int] | None:
        """UTF-8 of the text; None for a token that is a part of a character."""
        return None if UNFINISHED in self.text else list(self.text.encode())


@dataclass(frozen=True)
class Piece:
    """Text that is certain, and the tokens that begin in it."""

    text: str
    tokens: tuple[TokenText, ...] = ()


@dataclass
class Reply:
    """The answer to one ticket; `pieces` is read once, the rest is known afterwards."""

    ticket: Ticket
    tokenizer: Tokenizer
    stop: Sequence[str]
    finish: FinishReason = "stop"
    tokens: int = 0
    """Tokens the model gave for it, those of a stop string included."""
    _held: list[TokenText] = field(default_factory=list)
    _passed: int = 0

    async def pieces(self) -> AsyncIterator[Piece]:
        """Non-empty pieces as they come; raises `EngineFailure`."""
        decoder, scanner = StreamDecoder(self.tokenizer), StopScanner(self.stop)
        decoded, before = 0, self.ticket.request.prompt[-1:]
        async for token in self.ticket:
            self.tokens += 1
            if token.logprob is not None:
                self._held.append(self._describe(token, before, decoded))
            before = (token.id,)
            text = decoder.feed(token.id)
            decoded += len(text)
            passed = scanner.feed(text)
            if passed:
                yield self._piece(passed)
            if scanner.stopped:
                self.ticket.cancel()
                return
        rest = scanner.feed(decoder.flush())
        if not scanner.stopped:
            rest += scanner.flush()
            self.finish = self.ticket.finish or "stop"
        last = self._piece(rest, everything=not scanner.stopped)
        if last.text or last.tokens:
            yield last

    def _piece(self, text: str, *, everything: bool = False) -> Piece:
        self._passed += len(text)
        ready = [t for t in self._held if everything or t.offset < self._passed]
        self._held = self._held[len(ready) :]
        return Piece(text, tuple(ready))

    def _describe(self, token: EngineToken, before: tuple[int, ...], offset: int) -> TokenText:
        assert token.logprob is not None
        top = tuple(TokenText(self._text(i, before), value) for i, value in token.top)
        return TokenText(self._text(token.id, before), token.logprob, offset, top)

    def _text(self, token: int, before: tuple[int, ...]) -> str:
        """The token's text after `before`: many tokenizers drop the space of the first of a text."""
        known = self.tokenizer.decode(before, special=True)
        return self.tokenizer.decode((*before, token), special=True)[len(known) :]
