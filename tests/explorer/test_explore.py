"""The page of `explore`: what it holds against a plain computation, what it leaves out, how it behaves in a browser."""

import base64
import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import memlayers
import memlayers.explorer.view as module
from memlayers import Experts, MemoryConfig, MemoryLayer, MemoryPlus, load_memory, quantize_memory, save_memory
from memlayers.cli import main
from memlayers.diagnosis.subjects import find_subjects
from memlayers.explorer.words import Words, values_of
from memlayers.models import add_memory, causal_lm, memory_layers, remove_memory, set_active
from memlayers.storage.mapped import MappedTable

EVIL = '</script><img src="https://example.org/x.png" onerror="document.title=1"><b>&amp;'
TEXT = "\n".join(f"def f{n}(value):\n    return value + {n} * 'äöü'  # a comment" for n in range(12)) + "\n" + EVIL


@pytest.fixture(scope="module")
def tokenizer():
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=299, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokens.train_from_iterator([TEXT], trainer)
    found = PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<|end|>", eos_token="<|end|>")
    assert found.add_tokens([EVIL]) == 1
    return found


def model_with(kind=MemoryLayer, seed=0, family="gpt2", layers=(1, 2), num_subkeys=8, **how):
    torch.manual_seed(seed)
    model = causal_lm(family, vocab_size=300, layers=2, dim=32, heads=2, context=64)
    config = MemoryConfig(dim=32, heads=2, topk=3, num_subkeys=num_subkeys, query_dim=8)
    add_memory(model, config, layers, kind=kind, **how)
    for parameter in model.parameters():
        if parameter.ndim == 1 and len(parameter) == 32:  # gains, biases and gates that are not the initial ones
            parameter.data.uniform_(-1, 2)
    with torch.no_grad():
        for _ in range(30):  # the running statistics of the query's norm
            model.train()(input_ids=torch.randint(300, (2, 32)))
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return model_with()


@pytest.fixture(scope="module")
def made(model, tokenizer):
    return memlayers.explore(model, tokenizer, [TEXT, "a second text"])


def content(html):
    """The data in a page, and its arrays by the function that reads them."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def numbers(text, kind, *shape):
    return np.frombuffer(base64.b64decode(text), f"<{kind}").reshape(*shape)


def windows(tokenizer):
    for text in (TEXT, "a second text"):
        ids = [0, *tokenizer.encode(text, add_special_tokens=False)]
        yield from (ids[first : first + 64] for first in range(0, len(ids), 64))


def keep(inputs, name, layer, args, kwargs):
    inputs[name] = args[0][0]


@torch.no_grad()
def plainly(model, tokenizer):
    """Of each memory, slots and weights [T, H, K] of all tokens, window by window."""
    found = {name: ([], []) for name in memory_layers(model)}
    for ids in windows(tokenizer):
        inputs = {}
        handles = [
            layer.register_forward_pre_hook(partial(keep, inputs, name), with_kwargs=True)
            for name, layer in memory_layers(model).items()
        ]
        model(input_ids=torch.tensor([ids]))
        for handle in handles:
            handle.remove()
        for name, layer in memory_layers(model).items():
            # All scores of all slots, without the search.
            query_THQ = layer.query(inputs[name])
            first, second = (
                torch.einsum("thq,hnq->thn", half, keys)
                for half, keys in zip(query_THQ.chunk(2, -1), layer.keys.weight, strict=True)
            )
            scores, slots = (first[..., :, None] + second[..., None, :]).flatten(-2).topk(3)
            found[name][0].append(slots)
            found[name][1].append(scores.softmax(-1))
    return {name: tuple(torch.cat(parts).numpy() for parts in both) for name, both in found.items()}


def test_it_holds_what_a_plain_computation_finds_in_twenty_slots(made, model, tokenizer):
    page = content(made)
    strings = page["strings"]
    expected = plainly(model, tokenizer)
    ids = [token for window in windows(tokenizer) for token in window]
    tokens = numbers(page["tokens"], "u4", -1)
    assert [strings[place] for place in tokens] == [tokenizer.decode([token]) for token in ids]
    assert page["shown"] == len(ids) == len(tokens)
    assert [memory["name"] for memory in page["memories"]] == [*expected]
    head_CD, gain_D = model.lm_head.weight.detach(), model.transformer.ln_f.weight.detach()
    for memory, layer in zip(page["memories"], memory_layers(model).values(), strict=True):
        slots_THK, weights_THK = expected[memory["name"]]
        assert (numbers(memory["reads"]["slots"], "u4", *slots_THK.shape) == slots_THK).all()
        assert np.allclose(numbers(memory["reads"]["weights"], "u2", *slots_THK.shape) / 65535, weights_THK, atol=2e-5)
        details = memory["details"]
        detailed = numbers(details["slots"], "u4", -1)
        counts_S = np.bincount(slots_THK.ravel(), minlength=64)
        assert detailed.tolist() == counts_S.nonzero()[0].tolist()
        assert (memory["read"], memory["allReads"]) == (len(detailed), len(ids) * 6)
        levels = numbers(memory["map"]["levels"], "u1", -1)
        assert levels.tolist() == [0 if count == 0 else count.bit_length() for count in counts_S.tolist()]
        words, scores = (numbers(details[name], kind, -1, 8) for name, kind in (("words", "u4"), ("scores", "i2")))
        contexts, heads = (
            numbers(details[name], kind, -1, 5) for name, kind in (("contexts", "u4"), ("contextHeads", "u1"))
        )
        strengths = numbers(details["contextWeights"], "u2", -1, 5) / 65535
        for row in range(0, len(detailed), max(1, len(detailed) // 20))[:20]:
            slot = int(detailed[row])
            by_head = [(slots_THK[:, head] == slot).sum() for head in range(2)]
            assert numbers(details["counts"], "u4", -1, 2)[row].tolist() == by_head
            # The strongest reads: their places, and the weights that they have there.
            readers = np.argwhere(slots_THK == slot)
            strongest = sorted((weights_THK[tuple(at)] for at in readers), reverse=True)[:5]
            assert strengths[row][: len(strongest)] == pytest.approx(strongest, abs=2e-5)
            for place, head, weight in zip(contexts[row], heads[row], strengths[row], strict=True):
                if place != 2**32 - 1:
                    at = slots_THK[place, head].tolist().index(slot)
                    assert weights_THK[place, head, at] == pytest.approx(weight, abs=2e-5)
            # The top tokens: which, and how often.
            of_token = {}
            for at in readers:
                reads, weight = of_token.get(ids[at[0]], (0, 0.0))
                of_token[ids[at[0]]] = reads + 1, weight + weights_THK[tuple(at)]
            top = sorted(of_token.items(), key=lambda one: -one[1][1])[:5]
            shown = numbers(details["types"], "u4", -1, 5)[row].tolist()
            assert [strings[place] for place in shown if place != 2**32 - 1] == [
                tokenizer.decode([one]) for one, _ in top
            ]
            assert numbers(details["typeReads"], "u2", -1, 5)[row].tolist()[: len(top)] == [
                reads for _, (reads, _) in top
            ]
            value_D = layer.values.weight[slot].detach()
            logits_C = head_CD @ (gain_D * (value_D - value_D.mean()))
            best = logits_C.topk(8)
            assert [strings[place] for place in words[row]] == [tokenizer.decode([word]) for word in best.indices]
            assert (scores[row] / 32767 * details["scale"]).tolist() == pytest.approx(best.values.tolist(), abs=1e-3)
        assert len(detailed) >= 20


@pytest.mark.parametrize(
    ("kind", "family", "how"),
    [(MemoryPlus, "gpt2", {}), (Experts, "llama", {}), (MemoryLayer, "llama", {"mode": "parallel"})],
    ids=["memory_plus", "experts", "parallel"],
)
def test_words_are_those_that_the_value_raises_at_the_end_of_the_model(kind, family, how):
    """Added to a large hidden state before the final norm, a value moves the logits as its words say."""
    model = model_with(kind, family=family, layers=[2], **how)
    (subject,) = find_subjects(model)
    words = Words(model, torch.tensor([[1, 2, 3]]))
    norm = model.transformer.ln_f if family == "gpt2" else model.model.norm
    assert words.norm is norm
    layer = subject.layer
    ids, scores = words.nearest(subject, [3, 17], 4)
    added_RD = layer.output(layer.values.weight[[3, 17]]).detach().double()
    added_RD = added_RD * subject.gate.detach().double() if how else added_RD
    end = torch.nn.Sequential(norm, model.lm_head).double()
    for row, added_D in enumerate(added_RD):
        along_D = added_D - added_D.mean() if family == "gpt2" else added_D  # what changes the size of a hidden state
        hidden_D = 100 * torch.randn(32, dtype=torch.float64)
        hidden_D -= hidden_D.mean() if family == "gpt2" else 0
        hidden_D -= along_D * (hidden_D @ along_D) / (along_D @ along_D)
        moved_C = (end(hidden_D + added_D) - end(hidden_D - added_D)).detach() / 2
        best = (moved_C * hidden_D.square().mean().sqrt()).topk(4)
        assert ids[row].tolist() == best.indices.tolist()
        assert scores[row].tolist() == pytest.approx(best.values.tolist(), rel=1e-3)


def test_nothing_of_the_text_is_read_as_html(made):
    assert content(made)["strings"].count(EVIL) == 1
    assert "<img" not in made
    assert made.count("</script>") == 2
    assert "http" not in re.sub(r'<script type="application/json".*?</script>', "", made, flags=re.DOTALL).replace(
        "http-equiv", ""
    )


@pytest.mark.promise(
    "Command line and files", "a page about what a memory reads and its slots say", "supported",
    "`memlayers explore`, `memlayers.explore`: one file of at most 5 MB that asks the network for nothing",
)  # fmt: skip
def test_in_a_browser(made, page, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(made, "utf-8")
    page.requests.clear()
    page.open(file.as_uri())
    assert set(page.requests) <= {"about:blank", file.as_uri()}
    assert page.evaluate("document.title") == "model: what its memories read"
    # By keys alone: from the first token to the third, to its first slot, and back.
    page.evaluate("document.querySelector('#text span[tabindex=\"0\"]').focus()")
    page.press("ArrowRight", "ArrowRight", "Home", "ArrowRight", "ArrowRight")
    assert page.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"
    assert (
        page.evaluate("[...document.querySelectorAll('#text span[role=option]')].indexOf(document.activeElement)") == 2
    )
    rows = page.evaluate("document.querySelectorAll('#token-body tbody tr').length")
    assert rows == 6
    slots = numbers(content(made)["memories"][0]["reads"]["slots"], "u4", -1, 2, 3)
    shown = page.evaluate("[...document.querySelectorAll('#token-body td.slot')].map(e => Number(e.textContent))")
    assert shown == slots[2].ravel().tolist()
    page.press("Enter", "Enter")
    assert page.evaluate("document.activeElement.id") == "slot-title"
    assert page.evaluate("document.activeElement.textContent").startswith(f"Slot {slots[2, 0, 0]} = ")
    assert page.evaluate("document.querySelectorAll('#text span.reads').length") == len(
        {*np.argwhere(slots == slots[2, 0, 0])[:, 0].tolist()}
    )
    assert page.evaluate("document.querySelectorAll('.contexts li').length") >= 1
    page.press("Escape")
    assert page.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"
    # The other memory, a head, a cell of the map.
    page.evaluate("(e => { e.value = '1'; e.dispatchEvent(new Event('change')); })(document.querySelector('#memory'))")
    page.evaluate("(e => { e.value = '1'; e.dispatchEvent(new Event('change')); })(document.querySelector('#head'))")
    slots = numbers(content(made)["memories"][1]["reads"]["slots"], "u4", -1, 2, 3)
    shown = page.evaluate("[...document.querySelectorAll('#token-body td.slot')].map(e => Number(e.textContent))")
    assert shown == slots[2, 1].tolist()
    page.evaluate("document.querySelector('#map').focus()")
    page.press("ArrowDown", "ArrowRight")
    assert page.evaluate("document.querySelector('#map-said').textContent").startswith("Slot 9 = (1, 1): read ")
    page.click("#map")
    assert page.evaluate("document.querySelector('#slot-title').textContent") in (
        "Slot 27 = (3, 3)",
        "Slot 36 = (4, 4)",
    )
    # All of the text is there as text.
    assert EVIL in page.evaluate("document.querySelector('#text').textContent")
    assert page.evaluate("document.images.length") == 0
    assert set(page.requests) <= {"about:blank", file.as_uri()}
    assert page.faults == []


@pytest.mark.parametrize("width", [380, 1280])
def test_it_fits_into_a_window_of_any_width(made, page, tmp_path, width):
    file = tmp_path / "page.html"
    file.write_text(made, "utf-8")
    page.open(file.as_uri() + "#1:9", width=width)
    assert page.evaluate("document.querySelector('#slot-title').textContent") == "Slot 9 = (1, 1)"
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_two_checkpoints_side_by_side(model, tokenizer, page, tmp_path):
    other = model_with(seed=1)
    file = tmp_path / "page.html"
    made = memlayers.explore(model, tokenizer, TEXT, file, compare=other, name="before <b>", compare_name="after")
    assert file.read_text("utf-8") == made
    ours, theirs = (plainly(each, tokenizer) for each in (model, other))
    length = len(content(memlayers.explore(model, tokenizer, TEXT))["memories"][0]["reads"]["slots"]) * 3 // 4 // 24
    for memory, layer, match in zip(
        content(made)["memories"], *(memory_layers(each).values() for each in (model, other)), strict=True
    ):
        mine, others = (each[memory["name"]][0][:length] for each in (ours, theirs))
        detailed = numbers(memory["details"]["slots"], "u4", -1)
        counts_S = np.bincount(others.ravel(), minlength=64)
        assert numbers(memory["other"]["counts"], "u4", -1).tolist() == counts_S[detailed].tolist()
        was = np.bincount(mine.ravel(), minlength=64)
        both, only, new = (
            ((was > 0) & (counts_S > 0)).sum(),
            ((was > 0) & (counts_S == 0)).sum(),
            ((was == 0) & (counts_S > 0)).sum(),
        )
        assert [memory["other"][name] for name in ("both", "onlyThis", "onlyOther")] == [both, only, new]
        shared = np.mean(
            [len({*a} & {*b}) / 3 for a, b in zip(mine.reshape(-1, 3), others.reshape(-1, 3), strict=True)]
        )
        assert memory["other"]["meanOverlap"] == pytest.approx(shared)
        cosine = torch.cosine_similarity(layer.values.weight, match.values.weight).detach().numpy()[detailed]
        assert np.allclose(numbers(memory["other"]["cosine"], "i1", -1) / 127, cosine, atol=0.005)
    page.open(file.as_uri())
    page.evaluate(
        "(e => { e.value = 'difference'; e.dispatchEvent(new Event('change')); })(document.querySelector('#map-what'))"
    )
    assert (
        page.evaluate("document.querySelector('#legend').textContent")
        == "read more in before <b>alikeread more in after"
    )
    assert page.faults == []


def test_what_does_not_fit_is_left_out_and_the_page_says_so(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 46_000)
    monkeypatch.setattr(module, "ROOM", module.Room(reads=40_000, details=80_000, cells=400))
    model = model_with(num_subkeys=32)
    made = memlayers.explore(model, tokenizer, [TEXT] * 20, tokens=1000)
    assert len(made.encode()) <= 46_000
    page = content(made)
    assert page["shown"] < 1000
    assert f"The first {page['shown']} of 1,000 tokens are shown" in made
    assert "a text of 1,000 tokens (the first of a longer one)" in made
    memory = page["memories"][0]
    assert memory["map"]["block"] > 1
    assert len(numbers(memory["map"]["levels"], "u1", -1)) == (-(-32 // memory["map"]["block"])) ** 2
    assert len(numbers(memory["details"]["slots"], "u4", -1)) < memory["read"]


def test_a_model_keeps_its_modes(tokenizer):
    model = model_with().train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    memlayers.explore(model, tokenizer, TEXT, tokens=20)
    assert [module.training for module in model.modules()] == modes


def test_values_in_files_have_words_too(tmp_path):
    table = MappedTable(tmp_path, 64, 32)
    layer = MemoryLayer(MemoryConfig(dim=32, heads=2, topk=3, num_subkeys=8, query_dim=8), values=table)
    (subject,) = find_subjects(layer)
    rows = torch.tensor([5, 60])
    expected = torch.cat([table.read(row[None, None], torch.ones(1, 1)) for row in rows]).detach()
    assert torch.equal(values_of(subject, rows), expected)
    assert not torch.equal(expected[0], expected[1])
    table.close()


def test_tables_of_few_bits_have_a_page_and_are_set_beside_floats(model, tokenizer):
    page = memlayers.explore(quantize_memory(model_with()), tokenizer, TEXT, compare=model)
    memory = content(page)["memories"][0]
    assert memory["read"] > 8
    assert len(numbers(memory["details"]["words"], "u4", -1)) > 8
    assert numbers(memory["other"]["cosine"], "i1", -1).min() > 120


def test_a_mapped_table_has_the_page_of_one_in_memory(tokenizer, tmp_path):
    model = causal_lm("gpt2", vocab_size=300, layers=2, dim=32, heads=2, context=64).eval()
    add_memory(model, MemoryConfig(dim=32, heads=2, topk=3, num_subkeys=8, query_dim=8), [1], mode="parallel")
    torch.nn.init.ones_(model.transformer.h[0].mlp.gate)
    expected = content(memlayers.explore(model, tokenizer, TEXT))
    save_memory(model, tmp_path / "memory")
    mapped = load_memory(remove_memory(model), tmp_path / "memory", values="mapped")
    assert content(memlayers.explore(mapped, tokenizer, TEXT)) == expected


def test_memories_that_are_not_active_are_left_out(tokenizer):
    model = model_with(layers=[1], mode="parallel", name="news")
    add_memory(model, memory_layers(model)["transformer.h.0.mlp.memory"].config, [2], mode="parallel", name="law")
    set_active(model, "law")
    page = content(memlayers.explore(model, tokenizer, TEXT))
    assert [memory["name"] for memory in page["memories"]] == ["transformer.h.1.mlp.memory"]
    set_active(model, [])
    with pytest.raises(ValueError, match=r"model must have an active memory, .*set_active"):
        memlayers.explore(model, tokenizer, TEXT)


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    model = model_with()
    model.resize_token_embeddings(250)
    with pytest.raises(ValueError, match=r"tokenizer must be that of the model, which has 250 tokens, got one with to"):
        memlayers.explore(model, tokenizer, TEXT)


def test_usage_is_that_of_the_meter(made, model, tokenizer):
    with memlayers.UsageMeter(memory_layers(model)["transformer.h.1.mlp.memory"]) as meter, torch.no_grad():
        for ids in windows(tokenizer):
            model(input_ids=torch.tensor([ids]))
    report = meter.report()
    row = re.findall(r"<tr.*?</tr>", made, re.DOTALL)
    shown = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", one) for one in row if "<td>" in one]
    (whole,) = (one for one in shown if one[0] == "transformer.h.1.mlp.memory")
    overall = report.overall
    assert whole[1:6] == [
        "all heads",
        f"{overall.count_usage:.1f} %",
        str(round(64 - 0.64 * overall.count_usage)),
        f"{overall.top1_usage:.1f} %",
        f"{overall.kl:.2f}",
    ]
    heads = shown[shown.index(whole) + 1 :][:2]
    assert [one[1:3] for one in heads] == [
        [f"head {n}", f"{one.count_usage:.1f} %"] for n, one in enumerate(report.heads, start=1)
    ]


def test_the_command(model, tokenizer, tmp_path, capsys):
    folder, text, output = tmp_path / "model", tmp_path / "text.txt", tmp_path / "page.html"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text.write_text(TEXT, "utf-8")
    capsys.readouterr()
    words = ["explore", folder, "--text", text, "--output", output, "--tokens", "100", "--compare", folder]
    for _ in range(2):  # a page is replaced
        assert main([str(word) for word in words]) == 0
        assert capsys.readouterr().out.startswith(f"{output}: 0.")
    made = output.read_text("utf-8")
    assert "<h1>model</h1>" in made
    assert len(numbers(content(made)["tokens"], "u4", -1)) == 100
    assert content(made)["memories"][0]["other"]["meanOverlap"] == 1


def test_what_makes_no_sense_is_refused(model, tokenizer, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="texts must have at least one token, got none"):
        memlayers.explore(model, tokenizer, ["", ""])
    with pytest.raises(ValueError, match="texts must be strings, got a int"):
        memlayers.explore(model, tokenizer, [3])
    with pytest.raises(ValueError, match="tokens must be an integer of at least 1, got 0"):
        memlayers.explore(model, tokenizer, TEXT, tokens=0)
    with pytest.raises(ValueError, match="model must have at least one memory"):
        memlayers.explore(torch.nn.Linear(2, 2), tokenizer, TEXT)
    with pytest.raises(ValueError, match="compare must have 64 as slots of transformer.h.0.mlp.memory, got 81"):
        memlayers.explore(model, tokenizer, TEXT, compare=model_with(num_subkeys=9))
    with pytest.raises(
        ValueError, match=r"compare must have memories at transformer.h.0.mlp.memory, .*, got transformer"
    ):
        memlayers.explore(model, tokenizer, TEXT, compare=model_with(layers=[2]))
    for output in (tmp_path, tmp_path / "none" / "page.html", ""):
        with pytest.raises(ValueError, match="output must be a file in a folder that is there"):
            memlayers.explore(None, tokenizer, TEXT, output)  # before anything is done
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda *_: False)
        with pytest.raises(ValueError, match="output must be a file in a folder that can be written to, got"):
            memlayers.explore(None, tokenizer, TEXT, tmp_path / "page.html")
    for content in ("a text of mine", "<!doctype html><title>mine</title>"):
        (tmp_path / "mine.txt").write_text(content)
        with pytest.raises(ValueError, match="output must be a new file, or a page of an .*holds something"):
            memlayers.explore(None, tokenizer, TEXT, tmp_path / "mine.txt")
        assert (tmp_path / "mine.txt").read_text() == content
    broken = model_with()
    broken.lm_head.weight.data[7] = float("nan")
    with pytest.raises(ValueError, match="model must have finite values and outputs to be shown"):
        memlayers.explore(broken, tokenizer, TEXT)
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(ModuleNotFoundError, match=r"memlayers.explore needs jinja2: pip install 'memlayers\[lm\]'"):
        memlayers.explore(model, tokenizer, TEXT)
