"""A conversation with a model, in its own chat template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TextIO

from shoal.data.tokens.chat_template import ChatTemplate
from shoal.errors import DataError, GenerateError, ShoalError
from shoal.infer.load import LoadedModel
from shoal.infer.stream import TextStream
from shoal.models.sampling import Sampling, check_text

HELP = "/exit or Ctrl-D ends the chat, /clear forgets the conversation, Ctrl-C stops an answer"


@dataclass
class Chat:
    """A conversation so far, and how to sample the next answer."""

    model: LoadedModel
    template: ChatTemplate
    max_new_tokens: int
    sampling: Sampling
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, model: LoadedModel, *, system: str | None, max_new_tokens: int, sampling: Sampling) -> Chat:
        """Open a conversation. Raises `ModelError` without a tokenizer, `DataError` without a chat template."""
        model.need_tokenizer()
        template = ChatTemplate.of(model.files) if model.files else None
        if template is None:
            raise DataError(
                f"{model.name} has no chat template, so it is not a chat model; set --prompt to a text to continue"
            )
        chat = cls(model, template, max_new_tokens, sampling, system)
        chat.clear()
        return chat

    def clear(self) -> None:
        """Forget all messages but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, text: str, show: Callable[[str], None]) -> bool:
        """
        Answer `text`, showing pieces as they come; return whether the model ended the answer itself.

        The finished part of an interrupted answer stays in the conversation. Raises `ShoalError` if the conversation is too
        long or the template rejects it, and then forgets `text`.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            ids, room = self._prompt()
        except ShoalError:
            self.messages.pop()
            raise
        stream, pieces, count = TextStream(self.model.need_tokenizer(), ids), list[str](), 0

        def take(piece: str) -> None:
            pieces.append(piece)
            show(piece)

        def on_token(_row: int, token: int) -> None:
            nonlocal count
            count += 1
            take(stream.push(token))

        sampling, limit = self.sampling, min(self.max_new_tokens, room)
        sampling = replace(sampling, seed=sampling.seed + len(self.messages))  # different noise at each turn
        try:
            self.model.continue_tokens([ids], max_new_tokens=limit, sampling=sampling, on_token=on_token)
        finally:
            take(stream.close())
            self.messages.append({"role": "assistant", "content": "".join(pieces)})
        return count < limit

    def _prompt(self) -> tuple[list[int], int]:
        """Return the conversation as tokens, and how many more tokens fit the context."""
        ids = self.model.need_tokenizer().encode_chat(self.template.render(self.messages))
        context = self.model.model.shape.max_seq_len
        if len(ids) >= context:
            raise GenerateError(
                f"the conversation has {len(ids)} tokens, and the model's context is {context}; /clear starts a new one"
            )
        return ids, context - len(ids)


def chat_in_terminal(chat: Chat, lines: TextIO, out: TextIO) -> None:
    """Answer line by line until /exit or the end of `lines`."""
    interactive = lines.isatty() and out.isatty()

    def show(piece: str) -> None:
        out.write(piece)
        out.flush()

    if interactive:
        show(f"{chat.model.name}: {HELP}\n")
    while (line := _read_line(lines, interactive)) is not None:
        match line.strip():
            case "":
                continue
            case "/exit":
                return
            case "/clear":
                chat.clear()
                continue
            case text:
                _answer(chat, text, show)
    if interactive:
        show("\n")


def _answer(chat: Chat, text: str, show: Callable[[str], None]) -> None:
    try:
        ended = chat.answer(text, show)
        show("\n" if ended else f"\n[stopped at --tokens {chat.max_new_tokens} or at the end of the context]\n")
    except KeyboardInterrupt:
        show("\n")
    except ShoalError as error:
        show(f"[{error}]\n")


def _read_line(lines: TextIO, interactive: bool) -> str | None:
    """Return the next line, or None at the end. Raises `GenerateError` if it is not UTF-8: the rest is unreliable too."""
    try:
        line = _next_line(lines, interactive)
    except UnicodeDecodeError as error:
        raise GenerateError(
            f"standard input is not UTF-8 text: {error.reason}, 0x{error.object[error.start]:02x}"
        ) from None
    check_text(line or "", "standard input")
    return line


def _next_line(lines: TextIO, interactive: bool) -> str | None:
    """Return the next line; None at the end, and for Ctrl-C at the prompt."""
    if not interactive:
        return lines.readline() or None
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        return None
