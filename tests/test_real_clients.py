"""Exported files, at the key sets of the published models, do in diffusers what the live model does; `make clients`
asks the other clients the same."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.trainer.clients.table import Reading
from lorasmith.trainer.errors import UserError
from lorasmith.trainer.lorafile import LoraFile
from tools.clients.asked import CLIENTS, DETECTION, Readings, ask, foresee, slips
from tools.clients.bases import ARCHITECTURE, FamilyName, Subject, make_subject
from tools.clients.cases import Case, make_cases, published_keys
from tools.clients.places import NotAtHand, Place, python_of
from tools.clients.verdicts import TOLERANCE, Report, Verdict, errors_of, reading_of, refusals, table

FAMILIES: list[FamilyName] = list(ARCHITECTURE)
_FURTHER = pytest.mark.exhaustive
DIFFUSERS = CLIENTS[0]
DIFFUSERS_READS: Readings = {
    ("LoRA", "kohya"): {"diffusers": "same"},
    ("LoRA", "diffusers"): {"diffusers": "same"},
    ("LoCon", "kohya"): {"diffusers": "same"},
    ("LoCon", "diffusers"): {"diffusers": "same"},
    ("LoHa", "kohya"): {"diffusers": "none"},
    ("LoKr", "kohya"): {"diffusers": "none"},
    ("DoRA of the UNet", "kohya"): {"diffusers": "other"},
    ("DoRA of the UNet", "diffusers"): {"diffusers": "same"},
}
ONE_FAMILY_IS_ENOUGH = {("LoHa", "kohya"), ("LoKr", "kohya"), ("LoRA", "diffusers"), ("DoRA of the UNet", "kohya")}
FIVE = list(dict.fromkeys(kind for kind, _ in DIFFUSERS_READS))


@pytest.fixture(scope="module", params=[pytest.param(one, marks=[] if one == "sd1" else _FURTHER) for one in FAMILIES])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Subject, list[Case]]:
    """A narrow model with all the layers of the published one, and a file of each kind in each format."""
    folder = tmp_path_factory.mktemp(request.param)
    subject = make_subject(request.param, folder)
    return subject, list(make_cases(subject, folder, FIVE))


@pytest.mark.parametrize("kind", ["LoCon", "LoKr", "DoRA of the UNet"])  # the others' layers are among these
def test_the_narrow_files_have_the_key_sets_of_the_published_models(made: tuple[Subject, list[Case]], kind: str):
    subject, cases = made
    published = published_keys(subject.family, kind)
    for case in cases:
        if case.kind == kind:
            keys, meant = set(LoraFile.open(case.file).shapes), published.pop(case.format)
            if case.form == "lokr":  # which factors it takes apart depends on their size
                keys, meant = ({key.partition(".")[0] for key in own} for own in (keys, meant))
            assert keys == meant
    assert not published


def test_diffusers_does_what_the_live_model_does(made: tuple[Subject, list[Case]], tmp_path: Path):
    subject, cases = made
    for case in cases:
        for part in ["unet"] if "of the UNet" in case.kind else case.live:
            assert (case.live[part] - case.before[part]).norm() > 0.1 * case.before[part].norm()
    if subject.family == "sd1":
        cases = [*cases, spoilt(cases[0])]
    else:  # what is refused is refused before anything is looked at, and LoCon has the layers of LoRA
        cases = [case for case in cases if (case.kind, case.format) not in ONE_FAMILY_IS_ENOUGH]
    verdicts = list(ask(DIFFUSERS, Path(sys.executable), subject, cases, DIFFUSERS_READS, tmp_path))
    assert len(verdicts) == len(cases)
    if subject.family == "sd1":
        *verdicts, odd = verdicts
        assert odd.found == "other"
        assert odd.errors["text_encoder"] > 10 * TOLERANCE > TOLERANCE > odd.errors["unet"]
    assert [verdict for verdict in verdicts if not verdict.is_as_expected] == []
    assert all("not been correctly renamed" in v.said for v in verdicts if v.found == "none")


def spoilt(case: Case) -> Case:
    """The same with twice the change of its text encoder."""
    weights, file = load_file(case.file), case.file.with_name("spoilt.safetensors")
    for key in weights:
        if key.startswith("lora_te_") and key.endswith("lora_up.weight"):
            weights[key] = weights[key] * 2
    save_file(weights, file)
    return Case(case.family, case.kind, case.format, file, case.before, case.live)


# ---------------------------------------------------------------------------------------------------------------------
# what is made of the answers


def test_a_part_that_was_not_trained_must_stay_as_it_is():
    before = {"unet": torch.ones(4), "text_encoder": torch.ones(4)}
    live = before | {"unet": torch.tensor([1.0, 1.0, 1.0, 2.0])}
    assert errors_of(live, live, before) == {"unet": 0, "text_encoder": 0}
    assert reading_of(live, live, before) == "same"
    assert reading_of(before, live, before) == "none"
    assert errors_of(before, live, before)["unet"] == 1
    odd = live | {"text_encoder": torch.full((4,), 1.1)}
    assert errors_of(odd, live, before)["text_encoder"] == pytest.approx(0.1)
    assert reading_of(odd, live, before) == "other"
    assert reading_of(before | {"unet": torch.tensor([1.0, 1.0, 1.0, 3.0])}, live, before) == "other"


def test_the_table_shows_what_is_not_as_expected():
    verdicts = [
        Verdict("sd1", "LoRA", "kohya", "A", "same", "same", {"unet": 0.001, "text_encoder": 0.0025}),
        Verdict("sd1", "LoHa", "kohya", "A", "none", "none", {}, "ValueError: what is this"),
        Verdict("sd1", "LoRA", "kohya", "B", "other", "same", {"unet": 0.5}),
        Verdict("sd1", "LoHa", "kohya", "B", "none", "other", {"unet": 1.0}),
    ]
    *_, lora, loha = table(verdicts).splitlines()
    assert lora == "| sd1 | LoRA | kohya | same 0.0025 | **other 0.5, expected: same** |"
    assert loha == "| sd1 | LoHa | kohya | refused | **no effect, expected: other** |"
    [found] = table([Verdict("sd1", "LoRA", "kohya", "finds the base", "same", "none", {})]).splitlines()[2:]
    assert found.endswith("| **yes, expected: no** |")
    assert refusals(verdicts) == "- A, sd1 LoHa: `ValueError: what is this`\n"


@pytest.mark.parametrize(
    ("report", "good"),
    [
        (Report([Verdict("sd1", "LoRA", "kohya", "A", "same", "same", {"unet": 0.1})], {"B": "not asked"}), True),
        (Report([Verdict("sd1", "LoRA", "kohya", "A", "other", "same", {"unet": 0.1})]), False),
        (Report([Verdict("sd1", "LoRA", "kohya", "A", "same", "same", {})], {}, {"B": "died"}), False),
        (Report([Verdict("sd1", "LoRA", "kohya", "A", "same", "same", {})], slips=["the table of kinds"]), False),
        (Report([], {"A": "not asked"}), False),
    ],
)
def test_a_report_is_good_only_if_clients_were_asked_and_did_as_expected(report: Report, good: bool):
    assert report.is_good == good
    assert all(name in str(report) for name in [*report.skipped, *report.failed, *report.slips])


def test_a_place_without_its_python_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotAtHand, match=r"no python2\.7 on PATH"):
        python_of(Place("x", ("2.7",), ()), tmp_path, print)


def test_a_place_is_made_once(tmp_path: Path):
    said: list[str] = []
    place = Place("x", (f"{sys.version_info.major}.{sys.version_info.minor}",), ())
    first = python_of(place, tmp_path, said.append)
    assert python_of(place, tmp_path, said.append) == first
    assert first.is_file()
    assert len(said) == 1


def test_a_runner_that_dies_is_no_answer(tmp_path: Path):
    nothing = Subject("sd1", tmp_path, tmp_path / "given.safetensors", 1)
    case = Case("sd1", "LoRA", "kohya", tmp_path / "style.safetensors", {}, {})
    absent = replace(DIFFUSERS, runner="sdcpp_picture.py")  # what it imports is not here
    with pytest.raises(UserError, match=r"died before it answered about style.*log\.txt"):
        list(ask(absent, Path(sys.executable), nothing, [case], DIFFUSERS_READS, tmp_path))
    assert "cyllama" in (tmp_path / "log.txt").read_text(encoding="utf-8")


def of(client: str, kind: str, found: Reading, family: str = "sd1") -> Verdict:
    return Verdict(family, kind, "kohya", client, found, found, {})


def test_the_table_of_kinds_must_say_what_is_found():
    ours, dora = (
        DIFFUSERS.title,
        [of(DIFFUSERS.title, "DoRA", "other"), of(DIFFUSERS.title, "DoRA of the UNet", "same")],
    )
    assert list(slips([of(ours, "LoHa", "none"), *dora])) == []
    assert list(slips(dora[:1])) == []  # the file that diffusers reads was not tried
    [said] = slips([of(ours, "LoHa", "other"), of(ours, "LoRA", "same"), of(ours, "LoCon", "same")])
    assert said == f"the table of kinds says none of loha in {ours}, and it was other"
    invokeai = "InvokeAI 6.14.2"
    assert list(slips([of(invokeai, "LoKr", "same"), of(DETECTION, "LoKr", "none")])) == []
    assert len(list(slips([of(invokeai, "LoHa", "same"), of(DETECTION, "LoHa", "none")]))) == 1


def test_what_is_expected_comes_from_files_of_the_published_shapes(tmp_path: Path):
    readings = foresee("sd1", ["DoRA of the UNet"], tmp_path)
    told = {form: (own["diffusers"], own["InvokeAI"]) for (_, form), own in readings.items()}
    assert told == {"kohya": ("other", "other"), "diffusers": ("same", "none")}
