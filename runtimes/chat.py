"""A conversation with a model: history, context budget and streamed replies; no terminal in here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from losa_deploy.errors import InputError
from losa_deploy.interfaces import Session
from losa_deploy.text.tokenizer import Tokenizer

from .generate import GenerateOptions, stream_text

Notice = Callable[[str], None]


def no_notice(text: str) -> None:
    """The notice callback of a caller that shows none."""


class ChatSession:
    """Keeps the messages of one conversation within the model's context.

    When a conversation grows too long, its oldest question and answer are dropped, the system
    message never; `notice` is told. Ctrl-C during a reply ends the reply, not the conversation.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        options: GenerateOptions,
        *,
        system: str = "",
        notice: Notice = no_notice,
    ) -> None:
        """Raises `InputError` at once if the model has no chat template."""
        self._session = session
        self._tokenizer = tokenizer
        self._options = replace(options, stop_ids=(*options.stop_ids, *tokenizer.eos_ids))
        self._notice = notice
        self._system: tuple[Mapping[str, str], ...] = (_message("system", system),) if system else ()
        self._turns: list[tuple[Mapping[str, str], Mapping[str, str]]] = []
        tokenizer.chat((*self._system, _message("user", "Hello")))

    @property
    def messages(self) -> tuple[Mapping[str, str], ...]:
        """The conversation so far: the system message, then question and answer in turn."""
        return (*self._system, *(message for turn in self._turns for message in turn))

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self._turns.clear()

    def reply(self, text: str) -> Iterator[str]:
        """The model's answer to `text`, piece by piece; afterwards both are part of the conversation.

        An answer that was interrupted is kept as far as it came; without any text the question
        is forgotten too. Raises `InputError` if the question alone does not fit the context.
        """
        question = _message("user", text)
        prompt = self._fit(question)
        pieces: list[str] = []
        try:
            for piece in stream_text(self._session, self._tokenizer, prompt, self._options):
                pieces.append(piece)
                yield piece
        except KeyboardInterrupt:
            self._notice("The reply was stopped.")
            self._keep(question, pieces)
        except GeneratorExit:
            self._keep(question, pieces)
            raise
        else:
            self._turns.append((question, _message("assistant", "".join(pieces))))

    def _keep(self, question: Mapping[str, str], pieces: list[str]) -> None:
        if pieces:
            self._turns.append((question, _message("assistant", "".join(pieces))))

    def _fit(self, question: Mapping[str, str]) -> list[int]:
        """Ids of the conversation with `question`, after dropping as many old turns as necessary."""
        context = self._session.context_length
        prompt = self._prompt(question, self._turns)
        if not context:
            return prompt
        room = min(self._options.max_tokens, context // 4)
        dropped = 0
        while len(prompt) + room > context and dropped < len(self._turns):
            dropped += 1
            prompt = self._prompt(question, self._turns[dropped:])
        if len(prompt) >= context:
            raise InputError(
                f"The message has {len(prompt)} tokens, the model's context holds {context}.",
                hint="Shorten the message (or the system message).",
                details={"tokens": len(prompt), "context_length": context},
            )
        if dropped:
            del self._turns[:dropped]
            what = "turn was" if dropped == 1 else f"{dropped} turns were"
            self._notice(f"The oldest {what} dropped to stay within {context} tokens of context.")
        return prompt

    def _prompt(
        self, question: Mapping[str, str], turns: list[tuple[Mapping[str, str], Mapping[str, str]]]
    ) -> list[int]:
        history = (message for turn in turns for message in turn)
        return self._tokenizer.chat((*self._system, *history, question))


def _message(role: str, content: str) -> Mapping[str, str]:
    return {"role": role, "content": content}
