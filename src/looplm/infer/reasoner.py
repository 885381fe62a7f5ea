"""Questions in, steps and answers out: a model of the reasoning suite with its tokenizer and prompt format."""

from collections.abc import Sequence
from dataclasses import dataclass

from looplm.data.tasks.example import PROMPT_TAGS, Completion, parse_completion, render_prompt
from looplm.data.tokenizer import EOS_ID, check_text, longest_token, reasoning_tokenizer
from looplm.errors import DataError
from looplm.infer.decoders import EarlyExit
from looplm.infer.engine import Generation, OnToken, check_texts
from looplm.infer.sampling import SamplingConfig
from looplm.infer.speculate import Draft, generate_or_draft
from looplm.model.looped import LoopedLM

MAX_NEW_TOKENS = 320  # the longest worked solution of the suite has under 256


@dataclass(frozen=True)
class Reply:
    """One answered question."""

    completion: Completion
    text: str
    generation: Generation


class Reasoner:
    """A trained reasoner. Plain questions are wrapped in the prompt format."""

    def __init__(self, model: LoopedLM) -> None:
        self.model = model
        self.tokenizer = reasoning_tokenizer()
        self.most_characters = model.config.seq_len * longest_token(self.tokenizer)

    def prompt_ids(self, question: str) -> list[int]:
        """Token ids of a question in the prompt's tags; a pair of them that it already carries is not doubled. Any
        other tag that it spells out is plain text.

        Raises:
            DataError: the question is empty, not Unicode text, or surely longer than the model's context.
        """
        opening, closing = PROMPT_TAGS
        question = question.strip()
        if question.startswith(opening) and question.endswith(closing):
            question = question.removeprefix(opening).removesuffix(closing).strip()
        if not question:
            raise DataError("the prompt is empty; ask something, for example: What is 47 + 85?")
        check_text(question, most=self.most_characters)
        first, last = self.tokenizer.encode(render_prompt("")).ids
        return [first, *reasoning_tokenizer(reads_tags=False).encode(question).ids, last]

    def answer(
        self,
        questions: Sequence[str],
        *,
        n_loops: int | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        early: EarlyExit | None = None,
        draft: Draft | None = None,
        sampling: SamplingConfig | None = None,
        batch_size: int | None = None,
        on_token: OnToken | None = None,
    ) -> list[Reply]:
        """Answer all questions, `batch_size` at a time if given, the others taking the places of those that are
        answered; with `early`, tokens stop loops by its rule; with `draft`, one question after another by
        self-speculation.

        Raises:
            ConfigError: a draft was given, and `early` or `batch_size` too.
        """
        check_texts(questions)
        prompts = [self.prompt_ids(question) for question in questions]
        generations = generate_or_draft(
            self.model,
            prompts,
            draft=draft,
            early=early,
            batch_size=batch_size,
            eos_id=EOS_ID,
            max_new_tokens=max_new_tokens,
            n_loops=n_loops,
            sampling=sampling,
            on_token=on_token,
        )
        texts = [self.tokenizer.decode(generation.ids, skip_special_tokens=False) for generation in generations]
        return [
            Reply(parse_completion(text), text, generation) for text, generation in zip(texts, generations, strict=True)
        ]
