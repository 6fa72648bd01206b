"""The report as JSON, Markdown and HTML, and how it is kept."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bertrt.architecture import BertArchitecture
from bertrt.errors import EngineFolderError
from bertrt.folder import MANIFEST_NAME, EngineFolder
from bertrt.manifest import FileRecord, Heads, Manifest, Source
from bertrt_export.drift import keep
from bertrt_export.drift.budgets import check_budgets, resolve_budgets
from bertrt_export.drift.chart import layer_chart
from bertrt_export.drift.figures import FIGURES
from bertrt_export.drift.keep import check_writable, keep_in_engine, keep_in_folder
from bertrt_export.drift.prompts import BiasDrift, Lean, Prediction, PromptDrift
from bertrt_export.drift.report import DriftReport, EngineFacts, ExampleFacts, LayerDrift, facts

EVIL = '<script>alert("1")</script>&\'|`*_[x](y)\x00\x1b[31m\n# no'
FILES = {"drift.json", "drift.md", "drift.html"}


def make_report(text: str = "plain", **changes: object) -> DriftReport:
    figures = dict.fromkeys(FIGURES, 0.5) | {"non_finite": 0, "layer_snr_lowest": 31.0, "kl_mean": 0.001}
    budgets = resolve_budgets(
        "int8", {name: None for name in FIGURES if FIGURES[name].bound and name != "non_finite"}
    )
    budgets |= {"kl_mean": 0.01, "top1_agreement": 0.4}
    prediction = Prediction(token=3, token_str=text, reference=0.25, engine=0.2)
    report = DriftReport(
        engine=EngineFacts(
            name=text,
            source=Source(kind="hub", name=text, revision=text, weights_sha256="ab" * 32),
            precision="int8",
            dialect="ort",
            heads=Heads(mlm=True, nsp=True, pooler=True),
            backend="onnxruntime",
            threads=2,
        ),
        examples=ExampleFacts(
            text=text,
            text_sha256="cd" * 32,
            documents=3,
            sentences=1234,
            seed=0,
            examples=400,
            tokens=50_000,
            longest=511,
            masked=7_500,
            following=201,
        ),
        figures=figures,
        budgets=budgets,
        violations=(),
        layers=(
            LayerDrift(name="embeddings", snr_db=math.inf, non_finite=0),
            LayerDrift(name="layer 1", snr_db=31.0, non_finite=0),
            LayerDrift(name="layer 2", snr_db=-math.inf, non_finite=7),
        ),
        layer_tokens=12_000,
        prompts=(
            PromptDrift(
                prompt=text, reference=(prediction,) * 5, engine=(prediction,) * 5, kl=0.001, non_finite=0
            ),
            PromptDrift(prompt="NaN", reference=(prediction,) * 5, engine=(), kl=math.nan, non_finite=9),
        ),
        bias=BiasDrift(
            first=text,
            second=text,
            reference=0.45,
            engine=0.46,
            leans=(
                Lean(token_str=text, reference=-2.0, engine=-2.5),
                Lean(token_str="b", reference=9.0, engine=8.0),  # noqa: S106 - no password
            ),
        ),
        left_out={"Pooled output": text},
        versions={"bertrt": "0.1.0", "torch": text},
        machine={"cpu": text, "usable_cpus": 2, "instruction_sets": ["avx2", text]},
        seconds=12.34,
    )
    return replace(report, **changes)


def failing_report() -> DriftReport:
    figures = {**make_report().figures, "kl_mean": math.nan, "top1_agreement": 0.3}
    budgets = make_report().budgets
    return make_report(figures=figures, violations=check_budgets(figures, budgets))


def test_json_is_strict_and_complete() -> None:
    report = failing_report()
    text = json.dumps(report.to_json(), allow_nan=False)
    value = json.loads(text)
    assert value["format"] == "bertrt-drift"
    assert value["passed"] is False
    assert [violation["figure"] for violation in value["violations"]] == ["kl_mean", "top1_agreement"]
    assert value["violations"][0]["measured"] is None
    assert value["figures"]["kl_mean"] is None
    assert value["figures"]["top1_agreement"] == 0.3
    assert set(value["figures"]) == set(FIGURES)
    assert [layer["snr_db"] for layer in value["layers"]] == [None, 31.0, None]
    assert [layer["exact"] for layer in value["layers"]] == [True, False, False]
    assert value["engine"]["source"] == {
        "kind": "hub",
        "name": "plain",
        "revision": "plain",
        "weights_sha256": "ab" * 32,
        "seed": None,
    }
    assert value["engine"]["heads"] == {"mlm": True, "nsp": True, "pooler": True}
    assert value["bias"]["shift_points"] == pytest.approx(1)
    assert value["prompts"][1]["kl"] is None
    assert value["seconds"] == 12.3


def test_it_says_what_computed() -> None:
    report = make_report()
    assert facts(report)["Engine"] == "int8, dialect ort, backend onnxruntime, 2 threads"
    assert report.summary()["isa"] is None
    # The dialect is that of graphs, which the native backend does not read.
    native = replace(report, engine=replace(report.engine, backend="native", isa="amx"))
    assert facts(native)["Engine"] == "int8, backend native with amx, 2 threads"
    assert (native.summary()["backend"], native.summary()["isa"]) == ("native", "amx")
    assert native.to_json()["engine"]["isa"] == "amx"


def test_a_figure_over_its_budget_fails_and_is_named() -> None:
    report = failing_report()
    assert not report.passed
    for rendered in (report.to_markdown(), report.to_html()):
        assert re.search("over budget", rendered, re.IGNORECASE)
        assert "0.3" not in rendered.partition("top1_agreement")[0]
    assert (
        "- kl\\_mean is not finite" in report.to_markdown()
        or "- kl_mean is not finite" in report.to_markdown()
    )
    assert make_report().passed
    assert "over budget" not in make_report().to_html().lower()
    assert "**Within budget.**" in make_report().to_markdown()


class Tags(HTMLParser):
    """Checks that every tag that opens also closes, and keeps what there is."""

    VOID = frozenset({"meta", "line", "br", "link", "img", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.VOID
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(page: str) -> Tags:
    parser = Tags()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_the_page_is_well_formed_as_html_and_as_xml() -> None:
    for report in (
        make_report(),
        failing_report(),
        make_report(EVIL),
        make_report(prompts=(), bias=None, layers=()),
    ):
        page = report.to_html()
        assert page.startswith("<!DOCTYPE html>\n<html lang=")
        parse(page)
        ET.fromstring(page.replace("<!DOCTYPE html>\n", ""))  # noqa: S314 - our own page


def test_the_page_needs_nothing_but_itself() -> None:
    page = make_report().to_html()
    parser = parse(page)
    names = {tag for tag, _ in parser.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for _, attributes in parser.tags:
        assert not {"src", "href", "srcset", "data", "action", "background"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page, re.IGNORECASE)
    policy = [a["content"] for tag, a in parser.tags if tag == "meta" and a.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert "prefers-color-scheme: dark" in page
    assert "<svg" in page


def test_hostile_text_stays_text() -> None:
    page = make_report(EVIL).to_html()
    parser = parse(page)
    assert not {"script"} & {tag for tag, _ in parser.tags}
    # The same tags as for a harmless text: nothing in it became markup.
    assert [tag for tag, _ in parser.tags] == [tag for tag, _ in parse(make_report().to_html()).tags]
    shown = "".join(parser.text)
    assert '<script>alert("1")</script>&\'' in shown
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", page)
    markdown = make_report(EVIL).to_markdown()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", markdown)
    assert "<script>" not in markdown.replace("\\<script\\>", "")
    assert "\n# no" not in markdown
    # Rows keep their cells: a pipe of the text is none of the table's.
    for table in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(columns) == 1


def test_figures_prompts_and_layers_are_shown() -> None:
    report = make_report("tea")
    for shown in (report.to_markdown(), "".join(parse(report.to_html()).text)):
        for figure in FIGURES.values():
            assert figure.label in shown
        for part in (
            "31.0",
            "exact",
            "0.2500",
            "0.2000",
            "0.4500",
            "+1.00 points",
            "-0.50",
            "not finite",
            "cd" * 32,
        ):
            assert part in shown, part


def test_any_number_of_layers_has_a_chart() -> None:
    for count in (1, 2, 13, 25, 49):
        layers = tuple(LayerDrift(name=f"layer {n}", snr_db=130.0 - n, non_finite=0) for n in range(count))
        page = make_report(layers=layers).to_html()
        assert page.count("<rect") == count
        svg = ET.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])  # noqa: S314 - our own page
        for bar in svg.iter("rect"):
            assert float(bar.attrib["height"]) > 0
            assert 0 <= float(bar.attrib["x"]) <= 760 - float(bar.attrib["width"])
            assert 0 <= float(bar.attrib["y"]) <= 260


@pytest.mark.parametrize("limit", [0.0, 20.0, 500.0, 1e9])
@pytest.mark.parametrize("snr", [0.5, 31.0, 3000.0])
def test_the_chart_holds_any_budget(limit: float, snr: float) -> None:
    svg = layer_chart([LayerDrift(name="layer 1", snr_db=snr, non_finite=0)], limit)
    picture = ET.fromstring(svg[: svg.index("</svg>") + 6])  # noqa: S314 - our own chart
    lines = list(picture.iter("line"))
    assert 3 <= len(lines) <= 14
    assert all(0 <= float(line.attrib["y1"]) <= 260 for line in lines)


@pytest.fixture
def folder(tmp_path: Path) -> EngineFolder:
    manifest = Manifest(
        source=Source(kind="demo", name="demo", weights_sha256="ab" * 32),
        architecture=BertArchitecture.from_config({"model_type": "bert"}),
        precision="int8",
        dialect="ort",
        heads=Heads(mlm=True, nsp=True, pooler=True),
        backends={},
        files={},
    )
    path = tmp_path / "engine"
    path.mkdir()
    return EngineFolder(path, manifest).replace_manifest(manifest)


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def test_a_report_is_kept_beside_the_engine(folder: EngineFolder) -> None:
    kept = keep_in_engine(folder, make_report())
    assert names(folder.path) == {"engine.json", *FILES}
    reopened = EngineFolder.open(folder.path)
    assert reopened.manifest == kept.manifest
    assert reopened.manifest.drift == make_report().summary()
    assert reopened.manifest.drift["passed"] is True
    assert reopened.manifest.files == {}
    value = json.loads((folder.path / "drift.json").read_text(encoding="utf-8"))
    assert value == make_report().to_json()
    assert (folder.path / "drift.html").read_text(encoding="utf-8") == make_report().to_html()
    assert (folder.path / "drift.md").read_text(encoding="utf-8") == make_report().to_markdown()


def test_a_new_report_takes_the_place_of_the_old(folder: EngineFolder) -> None:
    keep_in_engine(keep_in_engine(folder, make_report()), failing_report())
    assert names(folder.path) == {"engine.json", *FILES}
    manifest = EngineFolder.open(folder.path).manifest
    assert manifest.drift == failing_report().summary()
    assert manifest.drift["violations"] == ["kl_mean", "top1_agreement"]
    assert manifest.drift["figures"]["kl_mean"] is None


@pytest.mark.parametrize("writes", range(5))
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interruption_leaves_a_valid_folder(
    writes: int, failure: BaseException, folder: EngineFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = keep_in_engine(folder, make_report())
    old = {name: (folder.path / name).read_bytes() for name in FILES}
    done = 0
    replace_file = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        nonlocal done
        if done == writes:
            raise failure
        done += 1
        return replace_file(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    expected = EngineFolderError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        keep_in_engine(folder, failing_report())
    monkeypatch.undo()
    assert names(folder.path) == {"engine.json", *FILES}
    manifest = EngineFolder.open(folder.path).manifest
    same = all((folder.path / name).read_bytes() == data for name, data in old.items())
    # A summary in the manifest is always that of the files beside it.
    assert manifest.drift == (make_report().summary() if writes == 0 else None)
    assert same is (writes <= 1)


def test_a_report_that_cannot_be_rendered_changes_nothing(
    folder: EngineFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = keep_in_engine(folder, make_report())
    before = {name: (folder.path / name).read_bytes() for name in names(folder.path)}
    monkeypatch.setattr(DriftReport, "to_html", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        keep_in_engine(folder, failing_report())
    assert {name: (folder.path / name).read_bytes() for name in names(folder.path)} == before


def test_a_full_disk_has_a_clear_error(folder: EngineFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keep, "write_file", full)
    with pytest.raises(EngineFolderError, match=r"cannot keep the drift report .*No space left.*--no-save"):
        keep_in_engine(folder, make_report())


def test_another_folder_is_made_and_the_engine_left_alone(folder: EngineFolder, tmp_path: Path) -> None:
    keep_in_folder(tmp_path / "a" / "b", make_report())
    assert names(tmp_path / "a" / "b") == FILES
    assert names(folder.path) == {"engine.json"}
    (tmp_path / "file").write_text("x")
    with pytest.raises(EngineFolderError, match="cannot keep the drift report"):
        keep_in_folder(tmp_path / "file", make_report())


def test_a_folder_is_tried_before_the_work(tmp_path: Path) -> None:
    check_writable(tmp_path)
    assert names(tmp_path) == set()
    check_writable(tmp_path / "yet" / "to be made")
    assert names(tmp_path) == set()
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(EngineFolderError, match=r"cannot keep .* pass --out-dir .* or --no-save"):
            check_writable(path)


def test_an_engine_that_was_replaced_meanwhile_is_left_alone(folder: EngineFolder) -> None:
    record = FileRecord(size=0, sha256="e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
    (folder.path / "other.onnx").touch()
    folder.replace_manifest(replace(folder.manifest, files={**folder.manifest.files, "other.onnx": record}))
    before = (folder.path / MANIFEST_NAME).read_bytes()
    with pytest.raises(EngineFolderError, match="replaced while it was measured; run drift again"):
        keep_in_engine(folder, make_report())
    assert (folder.path / MANIFEST_NAME).read_bytes() == before
    assert not (folder.path / "drift.json").exists()
