"""Generation that stops loops early, and self-speculation: full depth where nothing stops, batched = single, each
policy against an oracle without a cache, and drafted text = plain text."""

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import VARIANTS, crossed, tiny_config
from looplm.errors import ConfigError
from looplm.infer.decoders import EarlyExit, StopsEarly
from looplm.infer.depth import score_sequences
from looplm.infer.engine import Generation, generate
from looplm.infer.exits import KINDS, ExitRule
from looplm.infer.sampling import SamplingConfig
from looplm.infer.speculate import Draft, speculate
from looplm.model.loop.plan import LoopPlan
from looplm.model.looped import LoopedLM
from texts import QUEUE, spread_eos

PROMPTS = [[5, 6, 7], [9], [3, 4, 5, 6, 7, 8, 9, 10], [11, 12]]
DRAWN = SamplingConfig(temperature=1.3, top_k=9, repetition_penalty=1.2, seed=3)
THRESHOLDS = {"latent": 0.3, "kl": 0.02, "entropy": 3.4, "stable": 1, "gate": 0.3}
Make = Callable[..., LoopedLM]


def writes_text(name: str) -> bool:
    config = tiny_config(*VARIANTS[name])
    return config.exit.kind == "none" and not config.backout and config.n_outputs is None


EXITING = [name for name in VARIANTS if writes_text(name)]


def parts(name: str, kind: Any) -> list[str]:
    """Of a model that the rule can be asked of."""
    return [*VARIANTS[name], *(["exit.kind=gate"] if kind == "gate" else [])]


def rule_of(kind: Any) -> ExitRule:
    return ExitRule(kind, THRESHOLDS[kind])


@torch.inference_mode()
def recomputed_by_hand(model: LoopedLM, prompt: list[int], rule: ExitRule, *, n_new: int, n_loops: int) -> Generation:
    """The policy `recompute` without a cache: all keys are those of full depth, so that a token's states are those of a
    full forward; it is read out after the loop where the rule fires, a prompt after that of its last token."""
    ids, depths = list(prompt), []
    for _ in range(n_new):
        states: list[Tensor] = []
        model.hidden(torch.tensor([ids]), plan=LoopPlan(n_loops), states=states)
        inputs = model.inputs(torch.tensor([ids]))
        inputs.first = model.embed_tokens(torch.tensor([ids]))
        kept, depth = torch.full((1, rule.n_kept(model.config.d_head_out)), torch.nan), n_loops
        for loop_idx in range(n_loops):
            state = stopped_at(states, [*depths, loop_idx + 1], n_prompt=len(prompt))
            hidden = model.leave(model.inject.read_out(state), inputs, None)
            before, after = states[loop_idx - 1][:, -1], states[loop_idx][:, -1]
            change = (after - before).norm(dim=-1) / after.norm(dim=-1) if loop_idx else torch.full((1,), torch.inf)
            fires, kept = rule.fires(change, model.logits(hidden[:, -1]), kept, model.exit.done(after))
            if fires.item():
                depth = loop_idx + 1
                break
        depths.append(depth)
        state = stopped_at(states, depths, n_prompt=len(prompt))
        hidden = model.leave(model.inject.read_out(state), inputs, None)
        ids.append(int(model.logits(hidden[0, -1])[: model.config.n_targets].argmax()))
    return Generation(ids[len(prompt) :], "length", depths)


def stopped_at(states: list[Tensor], depths: list[int], *, n_prompt: int) -> Tensor:
    """(1, T, D): each token's state after its own number of loops, the prompt's tokens alike."""
    each = [depths[0]] * (n_prompt - 1) + depths
    return torch.stack([states[depth - 1][:, token] for token, depth in enumerate(each)], dim=1)


@pytest.mark.parametrize(("name", "kind"), crossed(EXITING, KINDS))
def test_recompute_is_each_token_cut_out_of_a_full_forward(name: str, kind: Any, make_model: Make) -> None:
    model = make_model(*parts(name, kind))
    together = generate(model, PROMPTS, eos_id=-1, max_new_tokens=6, n_loops=5, early=EarlyExit(rule_of(kind)))
    for prompt, generation in zip(PROMPTS, together, strict=True):
        assert generation == recomputed_by_hand(model, prompt, rule_of(kind), n_new=6, n_loops=5)


@pytest.mark.parametrize(("name", "missing"), crossed(EXITING, ["recompute", "last"]))
def test_threshold_0_is_full_depth_and_an_easy_rule_the_fewest_loops(name: str, missing: Any, make_model: Make) -> None:
    model = make_model(*parts(name, "gate"))
    for kind in KINDS:
        never = EarlyExit(ExitRule(kind, 0), missing)
        full = generate(model, PROMPTS, eos_id=2, max_new_tokens=9, n_loops=4)
        assert generate(model, PROMPTS, eos_id=2, max_new_tokens=9, n_loops=4, early=never) == full
    for kind, first in (("latent", 2), ("entropy", 1), ("gate", 1)):
        at_once = EarlyExit(ExitRule(kind, 1e6), missing)
        fewest = generate(model, PROMPTS, eos_id=2, max_new_tokens=9, n_loops=first)
        assert generate(model, PROMPTS, eos_id=2, max_new_tokens=9, n_loops=6, early=at_once) == fewest


@pytest.mark.parametrize(("name", "kind"), crossed(EXITING, KINDS))
def test_last_sees_a_prompt_as_depth_batching_does_and_batched_is_single(
    name: str, kind: Any, make_model: Make
) -> None:
    model = make_model(*parts(name, kind))
    early = EarlyExit(rule_of(kind), "last")
    if not any(config_part in name for config_part in ("moe-loops", "adapter", "loop-lora", "lti")):
        decoder = StopsEarly(model, early, batch_size=len(PROMPTS), capacity=20, n_loops=5)
        with torch.inference_mode():
            logits = decoder.prefill(PROMPTS)
        scored = score_sequences(model, list(map(torch.tensor, PROMPTS)), n_loops=5, rule=early.rule)
        for row, depth, expected in zip(logits, decoder.depths, scored, strict=True):
            assert depth == int(expected.depths[-1])
            torch.testing.assert_close(row, expected.logits[-1, : len(row)], atol=2e-5, rtol=1e-4)
    together = generate(model, PROMPTS, eos_id=2, max_new_tokens=12, n_loops=5, early=early)
    for prompt, generation in zip(PROMPTS, together, strict=True):
        assert [generation] == generate(model, [prompt], eos_id=2, max_new_tokens=12, n_loops=5, early=early)


def test_the_policies_differ_in_the_keys_alone(make_model: Make) -> None:
    model = make_model("inject.kind=diagonal", "n_coda=0", "n_core=1", "n_prelude=0")
    rule = ExitRule("latent", 1e6)
    decoders = {
        m: StopsEarly(model, EarlyExit(rule, m), batch_size=1, capacity=8, n_loops=4) for m in ("recompute", "last")
    }
    for decoder in decoders.values():
        with torch.inference_mode():
            decoder.prefill([[5, 6, 7]])
    kept, copied = decoders["recompute"].cache.slots, decoders["last"].cache.slots
    for loop_idx in (0, 1):
        torch.testing.assert_close(kept[loop_idx].keys, copied[loop_idx].keys)
    assert not kept[2].keys.any()
    torch.testing.assert_close(copied[3].keys[:, :, :3], copied[1].keys[:, :, :3])
    assert decoders["recompute"].late == [{2: [2, 1, 0]}]
    assert decoders["last"].late == [{}]


def test_texts_that_end_leave_the_batch(make_model: Make) -> None:
    model = make_model("smear={kind: channel, n_back: 1}", seed=3)
    prompts = [[a, b] for a in range(5, 17) for b in (1, 3)]
    for missing in ("recompute", "last"):
        early = EarlyExit(ExitRule("latent", 0.4), missing)
        free = generate(model, prompts, eos_id=-1, max_new_tokens=10, n_loops=4, early=early)
        eos = max(range(40), key=lambda token: len({tuple(g.ids).index(token) for g in free if token in g.ids}))
        ended = generate(model, prompts, eos_id=eos, max_new_tokens=10, n_loops=4, early=early)
        assert len({len(generation.ids) for generation in ended}) > 1
        assert len({depth for generation in free for depth in generation.depths}) > 1
        queued = generate(model, prompts, eos_id=eos, max_new_tokens=10, n_loops=4, early=early, batch_size=5)
        assert queued == ended
        for without, generation in zip(free, ended, strict=True):
            cut = without.ids.index(eos) + 1 if eos in without.ids else 10
            assert (generation.ids, generation.depths) == (without.ids[:cut], without.depths[:cut])


@pytest.mark.parametrize(("name", "missing"), crossed(EXITING, ["recompute", "last"]))
def test_a_text_in_anothers_place_stops_where_it_does_alone(name: str, missing: Any, make_model: Make) -> None:
    """21 prompts through 10 rows."""
    model = make_model(*parts(name, "latent"))
    options: dict[str, Any] = {"max_new_tokens": 12, "n_loops": 5, "early": EarlyExit(rule_of("latent"), missing)}
    eos = spread_eos(generate(model, QUEUE, eos_id=-1, **options))
    alone = [generate(model, [prompt], eos_id=eos, **options)[0] for prompt in QUEUE]
    assert len({len(generation.ids) for generation in alone}) > 1
    assert generate(model, QUEUE, eos_id=eos, batch_size=10, **options) == alone


@pytest.mark.long
def test_a_compiled_model_stops_where_the_plain_one_does(make_model: Make) -> None:
    model = make_model("inject.kind=diagonal")
    compiled = copy.deepcopy(model)
    compiled.compile_decoding()
    for prompts in (PROMPTS[:1], PROMPTS[1:3]):
        for missing in ("recompute", "last"):
            early = EarlyExit(ExitRule("latent", 0.3), missing)
            plain = generate(model, prompts, eos_id=2, max_new_tokens=12, n_loops=4, early=early)
            assert generate(compiled, prompts, eos_id=2, max_new_tokens=12, n_loops=4, early=early) == plain
    options: dict[str, Any] = {"max_new_tokens": 12, "n_loops": 4, "early": EarlyExit(ExitRule("latent", 0.3))}
    eos = spread_eos(generate(model, QUEUE[:8], eos_id=-1, **options))
    queues = [generate(each, QUEUE[:8], eos_id=eos, batch_size=2, **options) for each in (model, compiled)]
    assert queues[0] == queues[1]
    plain = generate(model, PROMPTS[:1], eos_id=2, max_new_tokens=12, n_loops=4)
    (drafted,) = speculate(compiled, PROMPTS[:1], draft=Draft(1, 3), eos_id=2, max_new_tokens=12, n_loops=4)
    assert [drafted.generation] == plain


@pytest.mark.parametrize(
    ("name", "how"), crossed(EXITING, list(product([None, DRAWN], [Draft(2, 5), Draft(1, 1), Draft(3, 30)])))
)
def test_drafted_text_is_plain_text(name: str, how: tuple[SamplingConfig | None, Draft], make_model: Make) -> None:
    model, (sampling, draft) = make_model(*VARIANTS[name]), how
    for prompt in PROMPTS:
        (plain,) = generate(model, [prompt], eos_id=2, max_new_tokens=20, n_loops=4, sampling=sampling)
        heard: list[int] = []
        (told,) = speculate(
            model,
            [prompt],
            draft=draft,
            eos_id=2,
            max_new_tokens=20,
            n_loops=4,
            sampling=sampling,
            on_token=lambda row, token, heard=heard: heard.append(token),  # type: ignore[misc]
        )
        assert told.generation == plain
        assert heard == plain.ids
        assert told.n_accepted <= told.n_drafted <= told.n_rounds * draft.n_tokens


def test_a_draft_that_is_always_right_takes_few_rounds(make_model: Make) -> None:
    """With nothing injected and layers that do nothing, every number of loops says the same."""
    model = make_model()
    for parameter in model.core.parameters():
        torch.nn.init.zeros_(parameter)
    (told,) = speculate(model, [[5, 6]], draft=Draft(1, 4), eos_id=-1, max_new_tokens=21, n_loops=4)
    assert (told.n_drafted, told.n_accepted, told.n_rounds) == (20, 20, 5)


def test_generation_runs_up_to_the_context(make_model: Make) -> None:
    model = make_model("inject.kind=diagonal")
    full = generate(model, [[1, 2, 3]], eos_id=-1, max_new_tokens=100, n_loops=3)
    never = EarlyExit(ExitRule("latent", 0), "last")
    assert len(full[0].ids) == model.config.seq_len - 3
    assert generate(model, [[1, 2, 3]], eos_id=-1, max_new_tokens=100, n_loops=3, early=never) == full
    (told,) = speculate(model, [[1, 2, 3]], draft=Draft(1), eos_id=-1, max_new_tokens=100, n_loops=3)
    assert [told.generation] == full


def test_what_cannot_be_is_one_clear_error(make_model: Make) -> None:
    with pytest.raises(ConfigError, match="did you mean 'recompute'"):
        EarlyExit(ExitRule(), "recomput")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="n_tokens is 0"):
        Draft(1, 0)
    with pytest.raises(ConfigError, match="leaves none of 2"):
        speculate(make_model(), [[1]], draft=Draft(2), eos_id=2, max_new_tokens=4)
    for part in ("exit.kind=act", "backout=true"):
        with pytest.raises(ConfigError, match="last state alone"):
            generate(make_model(part), [[1]], eos_id=2, max_new_tokens=4, early=EarlyExit(ExitRule()))
        with pytest.raises(ConfigError, match="last state alone"):
            speculate(make_model(part), [[1]], draft=Draft(1), eos_id=2, max_new_tokens=4)
