"""Before ⇒ after: the numbers agree with each other and with the file."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch

import fitcompress as fc
from fitcompress.errors import MissingDependencyError, OutputError
from fitcompress.model.costs import count_macs
from fitcompress.quantize import grid_of, plan_of
from fitcompress.report import plots
from fitcompress.storage.save_load import packed_bytes
from fitcompress.train import divergence


@pytest.fixture
def labelled(net, images) -> list[tuple[torch.Tensor, torch.Tensor]]:
    with torch.no_grad():
        labels = net(images).argmax(1)
    return list(zip(images.split(40), labels.split(40), strict=True))


def test_rows_agree_with_the_model(net, small) -> None:
    report = fc.report(net, small)
    assert [row.name for row in report.layers] == ["conv", "deep", "head", "out"]
    for row in report.layers:
        module, dense = small.get_submodule(row.name), net.get_submodule(row.name)
        weight, original = module.weight.detach(), dense.weight.detach()
        codes = grid_of(module).codes(weight)
        assert row.weights == weight.numel()
        assert row.bytes_before == 4 * row.weights
        zeros = int((weight == 0).sum())
        assert row.sparsity == pytest.approx(zeros / row.weights)
        error = (weight - original).square().sum() / original.square().sum()
        assert row.relative_error == pytest.approx(float(error), rel=1e-4)
        assert row.bits_per_weight == pytest.approx(8 * row.bytes_after / row.weights)
        assert 2 ** (row.weight_bits - 1) > int(codes.abs().max())
        assert row.grid == str(plan_of(small).levels[row.name].grid)


def test_totals_agree_with_the_file(net, small, labelled, images) -> None:
    report = fc.report(net, small, labelled, progress=False)
    assert report.before["bytes"] == 4 * sum(p.numel() for p in net.parameters())
    assert report.after["bytes"] == len(packed_bytes(small))
    assert sum(row.bytes_after for row in report.layers) < report.after["bytes"]
    assert report.before["accuracy"] == 100
    assert (
        report.after["accuracy"]
        == fc.evaluate(small, labelled, progress=False).accuracy
    )
    assert report.measured_loss_rise == pytest.approx(divergence(net, small, labelled))
    assert report.predicted_loss_rise == plan_of(small).distortion
    macs = count_macs(net, images[:1])
    bits = {row.name: row.weight_bits for row in report.layers}
    assert report.before["bops"] == 1024 * sum(macs.values())
    assert report.after["bops"] == sum(32 * bits[n] * m for n, m in macs.items())


def test_the_text_has_every_layer_and_total(net, small, labelled) -> None:
    report = fc.report(net, small, labelled, notes=("a [note]",), progress=False)
    text = str(report)
    for row in report.layers:
        line = next(x for x in text.splitlines() if re.search(rf"\b{row.name}\b", x))
        assert f"{row.weights:,}" in line
        assert f"{row.bytes_before:,} ⇒ {row.bytes_after:,}" in line
        assert f"32 ⇒ {row.bits_per_weight:.2f}" in line
    assert f"{report.after['bytes']:,}" in text
    assert "100.00 %" in text
    assert f"measured (KL) {report.measured_loss_rise:.4g}" in text
    assert plan_of(small).summary() in text
    assert "a [note]" in text


def test_a_report_without_data_has_no_accuracy(net, small) -> None:
    report = fc.report(net, small)
    assert set(report.before) == {"bytes"}
    assert report.measured_loss_rise is None
    assert "accuracy" not in str(report)


def test_reports_become_json(net, small, labelled) -> None:
    report = fc.report(net, small, labelled, progress=False)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["after"] == report.after
    assert [row["name"] for row in values["layers"]] == ["conv", "deep", "head", "out"]


def test_reporting_leaves_both_models_alone(net, small, labelled) -> None:
    net.train()
    before = packed_bytes(small)
    fc.report(net, small, labelled, progress=False)
    assert net.training
    assert packed_bytes(small) == before


class Page(HTMLParser):
    """Collects tags, attributes and text; checks that tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        names = ("href", "src", "xlink:href", "srcset", "action", "data")
        self.links += [value for name, value in attrs if name in names]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone(net, small, labelled, sensitivity, tmp_path) -> None:
    report = fc.report(
        net,
        small,
        labelled,
        sensitivity=sensitivity,
        notes=("<b>5 % & more</b>",),
        progress=False,
    )
    file = tmp_path / "report.html"
    report.html(file)
    text = file.read_text()
    page = Page(text)
    assert not {"script", "link", "iframe", "img", "object", "a"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    # No address but the names of vocabularies and of the maker, which nothing fetches.
    found = re.findall(r"https?://(?:www\.)?([^/\s\"'<]+)", text)
    assert set(found) <= {"w3.org", "purl.org", "creativecommons.org", "matplotlib.org"}
    assert page.tags.count("svg") == 2
    assert "<b>5 % & more</b>" in page.text
    for row in report.layers:
        assert row.name in page.text
        assert f"{row.bytes_after:,}" in page.text
    assert f"{report.after['bytes']:,}" in page.text
    report.html(tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == text


def test_the_front_is_that_of_the_plan(net, small, sensitivity) -> None:
    report = fc.report(net, small, sensitivity=sensitivity)
    families = {level.grid.family for level in plan_of(small).levels.values()}
    plans = fc.pareto(sensitivity, family=families.pop())
    assert report.front == tuple((p.size_bytes, p.distortion) for p in plans)


def test_pages_that_cannot_be_written(net, small, tmp_path) -> None:
    with pytest.raises(OutputError):
        fc.report(net, small).html(tmp_path / "no" / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_plots_need_matplotlib(net, small, tmp_path, monkeypatch) -> None:
    import builtins

    real = builtins.__import__

    def without(name: str, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"matplotlib.*To fix it: pip"):
        fc.report(net, small).html(tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []
    assert plots.BLUE.startswith("#")
