"""Text that goes on: a pretrained model with its tokenizer, no prompt format."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Protocol

from looplm.data.bpe import encode, load_tokenizer
from looplm.data.prepare import end_of_text
from looplm.data.tokenizer import check_text, longest_token
from looplm.errors import DataError
from looplm.infer.decoders import EarlyExit
from looplm.infer.engine import Generation, OnToken, check_texts
from looplm.infer.sampling import SamplingConfig
from looplm.infer.speculate import Draft, generate_or_draft
from looplm.model.looped import LoopedLM


class Codec(Protocol):
    """Text to ids and back; `end_id` ends a text, None where nothing does. `longest` is the most characters a token
    stands for."""

    @property
    def end_id(self) -> int | None: ...

    @property
    def longest(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class Utf8:
    """Text as its bytes."""

    end_id = None
    longest = 1

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        # a model may have more ids than there are bytes; 0xFF is in no text, so they are shown as U+FFFD
        return bytes(min(each, 0xFF) for each in ids).decode(errors="replace")


class Subwords:
    """Text as the tokens of a tokenizer.json."""

    def __init__(self, path: Path) -> None:
        self.tokenizer = load_tokenizer(path)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.end_id, self.longest = end_of_text(self.tokenizer), longest_token(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        return encode(self.tokenizer, text)

    def decode(self, ids: Sequence[int]) -> str:
        # a model may have more ids than the tokenizer, or the tokenizer gaps between them: those are shown as U+FFFD
        runs = groupby(ids, key=lambda each: self.tokenizer.id_to_token(each) is not None)
        return "".join(
            self.tokenizer.decode(list(run), skip_special_tokens=False) if is_known else "\ufffd" * len(list(run))
            for is_known, run in runs
        )


@dataclass(frozen=True)
class Completion:
    """One text gone on with."""

    text: str
    """What was added."""
    generation: Generation


class Completer:
    """A model of text with its codec."""

    def __init__(self, model: LoopedLM, codec: Codec) -> None:
        self.model, self.codec = model, codec

    def complete(
        self,
        prompts: Sequence[str],
        *,
        n_loops: int | None = None,
        max_new_tokens: int = 256,
        early: EarlyExit | None = None,
        draft: Draft | None = None,
        sampling: SamplingConfig | None = None,
        batch_size: int | None = None,
        on_token: OnToken | None = None,
    ) -> list[Completion]:
        """Go on with all prompts; `early`, `draft` and `batch_size` as for `Reasoner.answer`.

        Raises:
            ConfigError: a draft was given, and `early` or `batch_size` too.
            DataError: a prompt is empty and nothing begins a text, or it is not Unicode text or far too long.
        """
        check_texts(prompts)
        end_id = self.codec.end_id
        ids = [self._prompt_ids(prompt) for prompt in prompts]
        generations = generate_or_draft(
            self.model,
            ids,
            draft=draft,
            early=early,
            batch_size=batch_size,
            eos_id=-1 if end_id is None else end_id,
            max_new_tokens=max_new_tokens,
            n_loops=n_loops,
            sampling=sampling,
            on_token=on_token,
        )
        kept = [[token for token in generation.ids if token != end_id] for generation in generations]
        return [
            Completion(self.codec.decode(each), generation) for each, generation in zip(kept, generations, strict=True)
        ]

    def _prompt_ids(self, prompt: str) -> list[int]:
        """The end of the text before, as in training, then the prompt's own."""
        start = [] if self.codec.end_id is None else [self.codec.end_id]
        check_text(prompt, most=self.model.config.seq_len * self.codec.longest)
        ids = [*start, *self.codec.encode(prompt)]
        if not ids:
            raise DataError("the prompt is empty; begin a text, for example: The")
        return ids
