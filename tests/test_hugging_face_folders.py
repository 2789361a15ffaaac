"""Folders of Hugging Face: in, out, through the command line, and damaged ones."""

import builtins
import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fitcompress as fc
from command_line import done
from fitcompress.hugging_face import (
    build_model,
    load_model,
    load_tokenizer,
    save_pretrained,
)
from fitcompress.quantize import ActivationQuantizer, attach_activation
from hugging_face_nets import (
    batches,
    bert,
    llama,
    masked_bert,
    save_folder,
    save_sentences,
    save_tokens,
)
from packed_models import rounded


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return fc.remove(copy.deepcopy(model)).state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_gives_the_model_back(tmp_path, dtype) -> None:
    net = llama().to(dtype)
    folder = save_folder(tmp_path / "net", net)
    loaded, fresh = load_model(folder), build_model(folder)
    assert type(loaded) is type(fresh) is type(net)
    for key, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
        assert fresh.state_dict()[key].dtype == value.dtype
    for name, buffer in net.named_buffers():  # some are not in the state dict
        kept = buffer if dtype is torch.float32 else buffer.float()
        assert torch.allclose(fresh.get_buffer(name).float(), kept.float(), rtol=1e-2)
    assert not loaded.training and not fresh.training
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("make", "labels"), [(llama, "tokens"), (bert, "class"), (masked_bert, "tokens")]
)
def test_a_packed_file_goes_back_to_a_folder(tmp_path, make, labels) -> None:
    folder = save_folder(tmp_path / "dense", make())
    small = fc.compress(
        load_model(folder), batches(labels), fc.Budget(size="45%"), progress=False
    )
    fc.save(small, tmp_path / "f")
    before = values(small)
    loaded = fc.load(tmp_path / "f", build_model(folder))
    for number, model in enumerate((small, loaded)):
        out = tmp_path / f"small{number}"
        save_pretrained(model, out, tokenizer=folder)
        plain = type(loaded).from_pretrained(out)
        assert plain.state_dict().keys() == before.keys()
        for key, value in before.items():
            assert torch.equal(plain.state_dict()[key], value), key
        assert (out / "tokenizer.json").is_file()
    assert values(small).keys() == before.keys()  # left as it was
    assert fc.save(small, tmp_path / "again")
    if make is llama:
        assert plain.lm_head.weight is plain.model.embed_tokens.weight


def test_what_a_folder_cannot_hold(tmp_path) -> None:
    with pytest.raises(fc.errors.OptionError, match="no model of Hugging Face"):
        save_pretrained(nn.Linear(2, 2), tmp_path / "out")
    small = bert()
    attach_activation(small.classifier, ActivationQuantizer(8, dynamic=True))
    with pytest.raises(fc.errors.OptionError, match="inputs are quantized"):
        save_pretrained(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    plain = fc.remove(small, activations=True)
    with pytest.raises(fc.errors.OutputError, match="file"):
        save_pretrained(plain, tmp_path / "file" / "out")
    with pytest.raises(fc.errors.OutputError, match="a file of that name"):
        save_pretrained(plain, tmp_path / "file")
    dense = save_folder(tmp_path / "dense", bert())
    with pytest.raises(fc.errors.OptionError, match="overwrite"):
        save_pretrained(plain, tmp_path / "dense" / "../dense", tokenizer=dense)


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_damaged_and_foreign_folders(tmp_path) -> None:
    def folder(name: str) -> Path:
        return save_folder(tmp_path / name, bert())

    for missing in (tmp_path, tmp_path / "nowhere"):
        for load in (build_model, load_model):
            with pytest.raises(fc.errors.DataError, match=r"no config\.json"):
                load(missing)
    config = folder("config")
    (config / "config.json").write_text("{")
    with pytest.raises(fc.errors.FormatError, match="config"):
        build_model(config)
    silent = folder("silent")
    rewrite(silent, architectures=None)
    with pytest.raises(fc.errors.FormatError, match="no architectures"):
        load_model(silent)
    cut = folder("cut")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(fc.errors.FormatError, match="cut cannot be read"):
        load_model(cut)
    empty = folder("empty")
    (empty / "model.safetensors").unlink()
    with pytest.raises(fc.errors.FormatError, match="empty cannot be read"):
        load_model(empty)
    headless = folder("headless")
    bert().bert.save_pretrained(headless)
    rewrite(headless, architectures=["BertForSequenceClassification"])
    with pytest.raises(fc.errors.FormatError, match="no classifier"):
        load_model(headless)


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden_size": "wide"},
        {"hidden_size": [16]},
        {"num_attention_heads": 0},
        {"num_hidden_layers": {}},
        {"vocab_size": -3},
        {"architectures": 3},
        {"architectures": "BertModel"},
        {"dtype": "int7"},
        {"hidden_act": "none"},
    ],
    ids=str,
)
def test_fields_of_a_wrong_type(tmp_path, wrong) -> None:
    folder = save_folder(tmp_path / "net", bert())
    rewrite(folder, **wrong)
    for load in (build_model, load_model):
        with pytest.raises(fc.errors.FormatError, match="net"):
            load(folder)


def test_code_in_a_folder_is_not_run(tmp_path) -> None:
    evil = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    for number, changes in enumerate(
        (
            {"model_type": "mine"},
            {"architectures": ["Mine"]},
            {"model_type": None},
            {"architectures": ["pipeline"]},  # in transformers, but no model
            {"architectures": ["Trainer"]},
        )
    ):
        folder = save_folder(tmp_path / f"{number}", bert())
        (folder / "mine.py").write_text(evil)
        rewrite(folder, auto_map={"AutoConfig": "mine.C", "AutoModel": "mine.M"})
        rewrite(folder, **changes)
        for load in (build_model, load_model):
            with pytest.raises(fc.errors.DataError, match="needs code"):
                load(folder)
    assert not (tmp_path / "ran").exists()


def test_code_of_a_tokenizer_is_not_run(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(builtins, "input", lambda *_: "y")  # if it should ask
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    folder = save_folder(tmp_path / "net", bert())
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    rewrite(folder, model_type="mine", auto_map={"AutoConfig": "mine.C"})
    path = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": [None, "mine.T"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    with pytest.raises(fc.errors.DataError, match="needs code"):
        load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_not_read(tmp_path) -> None:
    folder = save_folder(tmp_path / "net", bert())
    (folder / "model.safetensors").unlink()
    torch.save(bert().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(fc.errors.FormatError, match="cannot be read"):
        load_model(folder)


def test_without_transformers(tmp_path, monkeypatch) -> None:
    folder = save_folder(tmp_path / "net", bert())
    real = builtins.__import__

    def refuse(name: str, *args: Any) -> Any:
        if name.partition(".")[0] == "transformers":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setitem(sys.modules, "transformers", None)
    for call in (
        lambda: load_model(folder),
        lambda: build_model(folder),
        lambda: fc.hugging_face.KeepSize,
    ):
        with pytest.raises(fc.errors.MissingDependencyError, match=r"fitcompress\[hf"):
            call()


def test_sentences_on_the_command_line(run, tmp_path) -> None:
    save_folder(tmp_path / "net", bert())
    save_sentences(tmp_path / "data")
    model = ("--model", "hf:net")
    data = ("--dataset", "tsv", "--data", "data")
    samples = ("--samples", 32)
    done(run("measure", *model, *data, *samples))
    done(run("search", "sensitivity.safetensors", "--size", "45%"))
    levels = fc.Plan.load("plan.json").levels
    inner = "bert.encoder.layer.0.attention.self"
    assert len({levels[f"{inner}.{x}"].grid for x in ("query", "key", "value")}) == 1
    assert "bert.embeddings.word_embeddings" in levels
    done(run("apply", "plan.json", *model, *data, *samples))
    small = Path("small.safetensors")
    whole = sum(p.numel() for p in bert().parameters())
    assert small.stat().st_size <= 0.45 * 4 * whole
    done(run("finetune", small, *model, *data, "--epochs", 1, "--batch-size", 16))
    done(run("evaluate", *model, *data, "--json", "dense.json"))
    result = done(run("evaluate", *model, *data, "--packed", small, "--json", "e.json"))
    dense, found = (json.loads(Path(n).read_text()) for n in ("dense.json", "e.json"))
    assert dense["bytes"] == 4 * whole and "divergence" not in dense
    assert found["divergence"] > 0 and "KL" in result.out
    assert f"accuracy {found['accuracy']:.2f} %" in result.out
    done(run("report", small, *model, *data))

    done(run("unpack", small, *model, "--out", "plain"))
    done(run("evaluate", "--model", "hf:plain", *data, "--json", "u.json"))
    assert json.loads(Path("u.json").read_text())["loss"] == found["loss"]
    # The weights of another file, in the folder's architecture.
    weights = ("--weights", "plain/model.safetensors")
    done(run("evaluate", *model, *data, *weights, "--json", "w.json"))
    assert json.loads(Path("w.json").read_text())["loss"] == found["loss"]


def test_unpacking_to_a_folder_destroys_nothing(run, tmp_path) -> None:
    net = bert()
    net.save_pretrained(tmp_path / "net")  # no tokenizer
    weights = tmp_path / "net" / "model.safetensors"
    before = weights.read_bytes()
    fc.save(rounded(net, fc.Grid(bits=4)), "small")
    Path("other").write_text("kept")
    arguments = ("unpack", "small", "--model", "hf:net")
    for out, code, told in (
        (("--out", "net"), 1, "overwrite"),
        (("--out", "other"), 1, "a file of that name"),
        (("--out", "small"), 1, "a file of that name"),
        ((), 2, "--out"),
    ):
        result = run(*arguments, *out)
        assert result.code == code, out
        assert told in result.err and "wrote" not in result.out, out
    assert weights.read_bytes() == before
    assert Path("other").read_text() == "kept"
    assert not Path("dense.safetensors").exists()
    done(run(*arguments, "--out", "plain"))
    assert {path.name for path in Path("plain").iterdir()} == {
        "config.json",
        "model.safetensors",
    }


def test_tokens_on_the_command_line(run, tmp_path) -> None:
    save_folder(tmp_path / "net", llama())
    save_tokens(tmp_path / "t.npy")
    model = ("--model", "hf:net")
    data = ("--dataset", "tokens", "--data", "t.npy")
    out = ("--size", "45%", "--samples", 16)
    done(run("compress", *model, *data, *out))
    plan = fc.PackedFile("small.safetensors").plan
    assert set(plan.levels) >= {"model.embed_tokens"}
    result = done(
        run("evaluate", *model, *data, "--packed", "small.safetensors", "--json", "j")
    )
    found = json.loads(Path("j").read_text())
    assert math.isclose(found["perplexity"], math.exp(found["loss"]))
    assert f"{found['loss']:.4f} nats per token, perplexity" in result.out
    assert math.isfinite(found["divergence"])


def test_tokens_that_the_model_does_not_have(run, tmp_path) -> None:
    save_folder(tmp_path / "net", llama())
    for wrong in (-1, llama().config.vocab_size):
        tokens = np.load(save_tokens(tmp_path / "t.npy")).astype(np.int64)
        tokens[3, 4] = wrong
        np.save("t.npy", tokens)
        result = run(
            *("evaluate", "--model", "hf:net", "--dataset", "tokens", "--data", "t.npy")
        )
        assert result.code == 1 and f"{wrong}" in result.err
        assert "does not have" in result.err


def test_layers_that_are_not_fused(run, tmp_path) -> None:
    net = llama()
    table = fc.measure(net, batches("tokens"), fc.label_loss(net), progress=False)
    table.save(tmp_path / "s")
    group = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    found = []
    for options in ((), ("--no-fused",), ("--fused",)):
        bits = ("--size", "16%", "--grids", "bits", *options)
        done(run("search", "s", *bits))
        levels = fc.Plan.load("plan.json").levels
        found.append(len({levels[name].grid for name in group}))
    assert found[0] == found[2] == 1 < found[1]
    done(run("search", "s", "--size", "30%", "--method", "path"))
    wrong = run("search", "s", "--size", "30%", "--method", "path", "--fused")
    assert wrong.code == 1 and "groups" in wrong.err


def test_sentences_that_do_not_fit_as_they_are(run, tmp_path) -> None:
    save_folder(tmp_path / "net", bert())  # has positions for 10 tokens
    save_sentences(tmp_path / "data")
    for name in ("train.tsv", "dev.tsv"):
        with (tmp_path / "data" / name).open("a") as file:
            file.write(f"{'very ' * 40} good\t1\n")
    model = ("--model", "hf:net", "--dataset", "tsv", "--data", "data")
    done(run("evaluate", *model))
    path = tmp_path / "net" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["pad_token"]
    path.write_text(json.dumps(config))
    result = run("evaluate", *model)
    assert result.code == 1 and "no pad_token" in result.err


def test_what_is_said_on_the_command_line(run, tmp_path) -> None:
    save_folder(tmp_path / "net", bert())
    save_sentences(tmp_path / "data")
    data = ("--dataset", "tsv", "--data", "data")
    for arguments, told in (
        (("--model", "hf:nowhere", *data), "no config.json"),
        (("--model", "digits", *data, "--weights", "w"), "w"),
        (("--model", "hf:net", "--dataset", "tsv"), "--data"),
        (("--model", "hf:net", "--dataset", "tokens", *data[2:]), "no file of tokens"),
        (("--model", "hf:net", "--dataset", "digits"), "does not run"),
        (("--model", "hf:net", "--dataset", "tvs"), "tokens"),
    ):
        result = run("compress", *arguments, "--size", "50%")
        assert result.code == 1, arguments
        assert told in result.err, arguments
    assert run("unpack", "p", "--model", "digits").code == 2
    needs = run("compress", "--model", "digits", "--dataset", "digits", "--size", "9%")
    assert needs.code == 1 and "--weights" in needs.err
