"""What leaks is measured as it is: shares, words and captions that are known beforehand are found, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image

from lorasmith.datasets.folder import scan
from lorasmith.trainer.bases import POCKET
from lorasmith.trainer.choosing.content import ContentScale
from lorasmith.trainer.choosing.features import Features, features_of_true
from lorasmith.trainer.choosing.leaking import leak_sentence, leaked, uninvited_words, unsaid
from lorasmith.trainer.choosing.leaks import leak_order, leaks_file, read_leaks
from lorasmith.trainer.choosing.neutral import SUBJECTS, neutral_prompts, words_of
from lorasmith.trainer.choosing.style import StyleScale
from lorasmith.trainer.demo import _true, read_held_out
from lorasmith.trainer.encoder import to_tensor
from lorasmith.trainer.errors import UserError
from lorasmith.trainer.example import EXAMPLES, STYLE
from lorasmith.trainer.jobs import create_run
from lorasmith.trainer.report.page import report_of

from .command import lorasmith
from .conftest import trained_run

# ---------------------------------------------------------------------------------------------------------------------
# prompts


def test_the_words_of_a_caption_are_those_that_say_what_is_to_be_seen():
    assert words_of("Ink_Style, a Red house on the hill 2", ["ink style"]) == {"red", "house", "hill"}
    assert words_of("une église à côté", []) == {"une", "église", "côté"}


@pytest.mark.parametrize("base", ["pocket", "stabilityai/stable-diffusion-xl-base-1.0"])
def test_neutral_prompts_name_nothing_that_captions_name(base: str):
    captions = [item.caption for item in scan(EXAMPLES / STYLE)] + ["emoji of a sleeping cat", "emoji of a red castle"]
    prompts = neutral_prompts(base, captions, ["blueprint"], 8)
    taught = frozenset().union(*(words_of(caption) for caption in captions)) - {"emoji"}
    assert len(set(prompts)) == 8
    assert all(not words_of(prompt) & taught for prompt in prompts)
    assert any(words_of(subject) & taught for subject in SUBJECTS)


def test_where_every_subject_is_named_none_is_neutral():
    assert neutral_prompts("other", [*SUBJECTS, "something else"], [], 8) == []


# ---------------------------------------------------------------------------------------------------------------------
# the share


@pytest.mark.parametrize(
    ("without", "asked", "share", "error"),
    [
        ([0, 0, 0], [1, 0.5, 0.75], 0, 0),
        ([1, 0.5, 0.75], [1, 0.5, 0.75], 1, 0),
        ([0.2, 0.4], [1, 1], 0.3, 0.1),
    ],
)
def test_the_share_that_leaks(without: list[float], asked: list[float], share: float, error: float):
    assert leaked(without, asked) == pytest.approx((share, error), abs=1e-12)


def test_of_one_prompt_the_error_is_not_known():
    assert leaked([0.1], [0.5]) == (pytest.approx(0.2), None)
    assert "±" not in leak_sentence(True, 0.1, 0.5, 0.0, 0.2, None)


def test_the_error_is_that_of_the_share_from_prompt_to_prompt():
    """Of many sets of eight prompts the shares spread as widely as the error says."""
    draw = torch.Generator().manual_seed(0)
    shares, errors = [], []
    for _ in range(300):
        asked = 0.8 + 0.2 * torch.randn(8, generator=draw)
        without = 0.4 * asked + 0.15 * torch.randn(8, generator=draw)
        share, error = leaked(without.tolist(), asked.tolist())
        assert error is not None
        shares.append(share)
        errors.append(error)
    assert torch.tensor(errors).mean().item() == pytest.approx(torch.tensor(shares).std().item(), rel=0.2)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(POCKET / "vae").float().eval()


@pytest.fixture(scope="module")
def training(vae: AutoencoderKL) -> Features:
    files = [item.path for item in scan(EXAMPLES / STYLE)]
    return features_of_true(vae, to_tensor([Image.open(file).resize((64, 64)) for file in files]))


def test_true_pictures_in_the_place_of_a_loras_leak_as_much_as_was_mixed_in(vae: AutoencoderKL, training: Features):
    files = [file for _, file in read_held_out()][:12]
    plain, target = _true("base", files), _true("target", files)
    base, asked = features_of_true(vae, plain), features_of_true(vae, target)
    style = StyleScale.fit(base, training)
    assert style.is_known

    def share(mixed: float) -> float:
        without = features_of_true(vae, (1 - mixed) * plain + mixed * target)
        return leaked(style.gained(without, base).tolist(), style.gained(asked, base).tolist())[0]

    shares = [share(mixed) for mixed in (0, 0.2, 0.5, 1)]
    assert shares[0] == pytest.approx(0, abs=1e-4)
    assert shares[-1] == pytest.approx(1)
    assert shares == sorted(shares)
    assert 0.1 < shares[1] < shares[2] < 0.9


@pytest.mark.parametrize(
    ("is_known", "without", "asked", "word", "sentence"),
    [
        (False, 0.5, 0.5, 0.0, "the base draws these prompts in the style already"),
        (True, 0.1, 0.2, 0.0, "Train longer"),
        (True, 0.1, 0.8, 0.0, "Hardly anything leaks"),
        (True, 0.3, 0.8, 0.0, "A part leaks"),
        (True, 0.7, 0.8, 0.0, "The style leaks"),
        (True, 0.7, 0.8, 0.4, "the base knows the word already"),
    ],
)
def test_the_share_in_a_sentence(is_known: bool, without: float, asked: float, word: float, sentence: str):
    assert sentence in leak_sentence(is_known, without, asked, word, without / asked, 0.05)


# ---------------------------------------------------------------------------------------------------------------------
# words


def test_a_word_whose_images_the_pictures_move_towards_is_named():
    words = [frozenset({"emoji", "face"} if row < 6 else {"emoji", f"thing{row // 2}"}) for row in range(24)]
    draw = torch.Generator().manual_seed(1)
    moved = 0.02 * torch.randn(24, generator=draw)
    moved[:6] += 0.1
    found, looked_at = uninvited_words(moved, words)
    assert [(one.word, one.images) for one in found] == [("face", 6)]
    assert looked_at == 1 + 9  # a word of all images is none that can be told apart


def test_words_are_named_by_chance_as_seldom_as_is_said():
    draw = torch.Generator().manual_seed(2)
    words = [frozenset(f"w{n}" for n in range(12) if torch.rand((), generator=draw) < 0.3) for _ in range(32)]
    named = sum(bool(uninvited_words(torch.randn(32, generator=draw), words)[0]) for _ in range(400))
    assert named / 400 < 0.15


def test_of_a_few_images_no_word_is_named():
    assert uninvited_words(
        torch.tensor([1.0, 1.0, 0.0, 0.0]), [frozenset("a"), frozenset("a"), *[frozenset()] * 2]
    ) == (
        (),
        0,
    )


def test_images_that_look_alike_without_a_word_for_it_are_named():
    captions = [
        "ink of melon",
        "ink of tangerine",
        *(f"ink of thing {name}" for name in "abcdefgh"),
        "ink",
        "ink of dog",
    ]
    words = [words_of(caption) for caption in captions]
    names = [f"{number}.png" for number in range(len(captions))]
    draw = torch.Generator().manual_seed(3)
    agreement = 0.05 * torch.randn(12, 12, generator=draw)
    agreement = (agreement + agreement.T) / 2
    agreement[0, 1] = agreement[1, 0] = 0.9
    agreement[2, 3] = agreement[3, 2] = 0.9  # both have the word "thing"
    found = unsaid(agreement, words, names, captions)
    assert found.everywhere == ("ink",)
    assert found.empty_of_words == ("10.png",)
    assert [group.images for group in found.unnamed] == [("0.png", "1.png")]
    assert found.unnamed[0].captions == ("ink of melon", "ink of tangerine")


def test_the_example_has_a_word_for_all_that_looks_much_alike(training: Features):
    """Its faces are all called so; what else agrees are round things."""
    items = scan(EXAMPLES / STYLE)
    content = ContentScale.fit(training, training)
    words = [words_of(item.caption) for item in items]
    found = unsaid(
        content.agreement(training), words, [item.path.name for item in items], [item.caption for item in items]
    )
    assert found.everywhere == ("emoji",)
    assert found.empty_of_words == ()
    assert not any(all("face" in caption for caption in group.captions) for group in found.unnamed)


# ---------------------------------------------------------------------------------------------------------------------
# a run


@pytest.mark.parametrize(
    ("data", "given", "told"),
    [
        ({"trigger": ""}, {}, "has no trigger"),
        ({"trigger": "trg"}, {"prompts": ["a TRG house"]}, "holds the trigger"),
        ({"trigger": "trg"}, {"strength": 0.0}, "nothing of what was trained acts"),
    ],
)
def test_what_cannot_be_measured_is_refused(short_run, pictures: Path, data: dict, given: dict, told: str):
    run = create_run(short_run(data=[{"path": str(pictures), **data}]))
    with pytest.raises(UserError, match=told):
        leak_order(run, None, given.get("strength", 1.0), given.get("prompts", ["a house"]))


def test_the_command_writes_picture_page_and_json_and_the_report_shows_them(short_run, tmp_path: Path):
    trainer = trained_run(short_run(sample={"every": 0, "steps": 2}))
    run = trainer.run
    said = lorasmith(tmp_path, "leaks", run.path, "--prompt", "emoji of owl", "--prompt", "emoji of <b>car", "--json")
    told = json.loads(said.stdout)
    found = told["leaks"]
    assert [one["prompt"] for one in found["pictures"]] == ["emoji of owl", "emoji of <b>car"]
    assert found["pictures"][0]["with_trigger"] == "trg, emoji of owl"
    assert found["step"] == trainer.state.step
    assert found["sentence"].startswith("What leaks cannot be told")  # after four steps there is no style yet
    assert found["leak"] is None

    order = leak_order(run, None, 1.0, ["emoji of owl", "emoji of <b>car"])
    assert read_leaks(leaks_file(order)) is not None
    assert len({file.read_bytes() for file in order.files().values()}) == 8  # no two are the same picture
    page = Path(told["page"]).read_text(encoding="utf-8")
    assert page.count("data:image/") == 8
    assert "<b>car" not in page
    with Image.open(told["sheet"]) as sheet:
        assert sheet.width > 4 * 128
    report = report_of(run)
    assert found["sentence"] in report.replace("&#x27;", "'")
    assert report.count("the base, trigger") > 1
    assert "<b>car" not in report

    again = lorasmith(tmp_path, "leaks", run.path, "--prompt", "emoji of owl", "--count", 3, code=2)
    assert "--count 3: has no effect" in again.stderr
    leaks_file(order).write_text("{", encoding="utf-8")
    assert "was not looked at yet" in report_of(run)
