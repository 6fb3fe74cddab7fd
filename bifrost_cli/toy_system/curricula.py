"""What the bases of a built-in system learn of their world: its drawings, the MLLM's questions and answers, its probe.

Legend: B images, H W pixels, P visual tokens, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bifrost_cli.models.mllm.chat_template import chat_text, join_plan, user_turn
from bifrost_cli.shapes import captions as captions1
from bifrost_cli.shapes import draw as draw1
from bifrost_cli.shapes import scene as scene1
from bifrost_cli.shapes import words as words1
from bifrost_cli.shapes.second import captions as captions2
from bifrost_cli.shapes.second import draw as draw2
from bifrost_cli.shapes.second import scene as scene2
from bifrost_cli.shapes.second import words as words2

FILL_QUESTION = "What is in these cells?"
Row = tuple[str, str, bool]  # question, answer, whether every other word of the answer is given


class Curriculum(ABC):
    """Lessons of one world.

    Three kinds of rows share every batch of the MLLM, `eighths` of it each:

    * plan: the planning instruction of `generate --plan`, answered with a plan;
    * fill: the image prompt that the branch will read, continued with what it says (so that the branch can look it up
      in the prompt's keys and values);
    * look: an image and a question about it.
    """

    eighths: dict[str, int]
    vae_side: int  # px, side of the crops that the VAE is trained on

    @abstractmethod
    def sample(self, rng: np.random.Generator) -> tuple[Any, Any]:
        """A prompt of the training split and a scene that shows it, of anything the bases may see."""

    @abstractmethod
    def crowded(self, rng: np.random.Generator) -> Any:
        """A scene with more to see than captioned ones have."""

    @abstractmethod
    def draw(self, scene: Any) -> np.ndarray:
        """The image, (H, W, 3) uint8."""

    @abstractmethod
    def words(self, texts: Iterable[str] = ()) -> list[str]:
        """Every word of the world and of `texts`."""

    @abstractmethod
    def sentence(self, rng: np.random.Generator, scene: Any) -> str:
        """What open_clip reads of a scene."""

    @abstractmethod
    def row(self, kind: str, rng: np.random.Generator, prompt: Any, scene: Any, instruction: str) -> Row:
        """One of the MLLM's rows."""

    @abstractmethod
    def probe(self, width: int) -> Probe:
        """A reader of visual tokens that is trained beside the MLLM and thrown away: it keeps in the latents what a
        caption loss alone loses with depth."""

    def drawn(self, scenes: Iterable[Any]) -> Tensor:
        """The scenes as images, uint8 (B, H, W, 3)."""
        return torch.from_numpy(np.stack([self.draw(scene) for scene in scenes]))

    def vae_images(self, rng: np.random.Generator, count: int, crowded: float) -> Tensor:
        """`count` drawings (B, 3, H, W) in -1 to 1, of which a share `crowded` are; cut to `vae_side`."""
        scenes = [self.crowded(rng) if rng.random() < crowded else self.sample(rng)[1] for _ in range(count)]
        return self.drawn(scenes).permute(0, 3, 1, 2).float() / 127.5 - 1


class Probe(nn.Module, ABC):
    """Reads a world's contents from visual tokens."""

    @abstractmethod
    def loss(self, latents_BPD: Tensor, scenes: Sequence[Any], pixels_BHW3: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What its errors cost, and numbers for the log."""


class GridCurriculum(Curriculum):
    """The first world: fill rows say what cells hold, in random order; its probe reads a cell from each token."""

    eighths = {"plan": 3, "fill": 3, "look": 2}
    vae_side = scene1.SIZE

    def sample(self, rng: np.random.Generator) -> tuple[Any, Any]:
        return captions1.training_sample(rng)

    def crowded(self, rng: np.random.Generator) -> Any:
        return draw1.crowded_scene(rng)

    def draw(self, scene: Any) -> np.ndarray:
        return draw1.draw(scene)

    def words(self, texts: Iterable[str] = ()) -> list[str]:
        return words1.words([*texts, FILL_QUESTION])

    def sentence(self, rng: np.random.Generator, scene: Any) -> str:
        """Its things, in half of the sentences the first one's place, and the background."""
        where = f" at the {words1.place(scene.things[0])}" if scene.things and rng.random() < 0.5 else ""
        return f"{words1.describe(scene)}{where} on a {scene.tone} background"

    def row(self, kind: str, rng: np.random.Generator, prompt: Any, scene: Any, instruction: str) -> Row:
        plan = words1.write_plan(scene, prompt)
        if kind == "plan":
            return user_turn(instruction.format(prompt=prompt.text)), plan, False
        if kind == "fill":
            return chat_text(join_plan(prompt.text, plan)), " " + filled(rng, scene), True
        image = "<|vision_start|>" + "<|image_pad|>" * len(words1.CELL_WORDS) + "<|vision_end|>"
        if rng.random() < 0.3:
            return user_turn(image + FILL_QUESTION), filled(rng, scene), True
        question, answer = words1.sample_question(rng, scene)
        return user_turn(image + question), answer, False

    def probe(self, width: int) -> Probe:
        return GridProbe(width)


def filled(rng: np.random.Generator, scene: scene1.Scene) -> str:
    """What half of the cells hold, all cells with things among them, in random order."""
    classes = words1.cell_classes(scene)
    order = sorted(rng.permutation(len(classes)), key=lambda cell: classes[cell] == 0)[: len(classes) // 2]
    return words1.fill_cells(scene, rng.permutation(order).tolist())


class GridProbe(Probe):
    """Reads thing (31 classes), tone (3) and offset (2, in pixels) of a token's cell."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = [len(words1.THING_WORDS) + 1, len(scene1.TONES), 2]
        self.head = nn.Linear(width, sum(self.sizes))

    def loss(self, latents_BPD: Tensor, scenes: Sequence[Any], pixels_BHW3: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of thing and tone plus squared error of the offsets where there is a thing."""
        thing_BPK, tone_BPK, offset_BP2 = self.head(latents_BPD).split(self.sizes, dim=-1)
        classes_BP = torch.from_numpy(np.stack([words1.cell_classes(scene) for scene in scenes]))
        tones_BP = torch.tensor([[*scene1.TONES].index(scene.tone) for scene in scenes])[:, None].expand_as(classes_BP)
        true_BP2 = torch.zeros(*classes_BP.shape, 2)
        for index, scene in enumerate(scenes):
            for thing in scene.things:
                true_BP2[index, thing.cell] = torch.tensor([thing.dx, thing.dy], dtype=torch.float32)
        error = (offset_BP2 - true_BP2).square().sum(-1)
        loss = nn.functional.cross_entropy(thing_BPK.flatten(0, 1), classes_BP.flatten())
        loss = loss + 0.2 * nn.functional.cross_entropy(tone_BPK.flatten(0, 1), tones_BP.flatten())
        right = (thing_BPK.argmax(-1) == classes_BP)[classes_BP > 0].float().mean()
        return loss + 0.1 * error[classes_BP > 0].mean(), {"probe_right": right}


CELL = 16  # px of the second world that a visual token covers
CELLS = scene2.SIZE // CELL


class FreeCurriculum(Curriculum):
    """The second world: fill rows say again in one wording what a prompt says, or where its plan puts what."""

    eighths = {"plan": 2, "fill": 3, "look": 3}
    vae_side = scene2.SIZE // 2  # a crop has as much to learn a pixel as an image

    def sample(self, rng: np.random.Generator) -> tuple[Any, Any]:
        prompt = captions2.sample_prompt(rng)
        return prompt, captions2.sample_scene(rng, prompt)

    def crowded(self, rng: np.random.Generator) -> Any:
        return draw2.crowded_scene(rng)

    def draw(self, scene: Any) -> np.ndarray:
        return draw2.draw(scene)

    def vae_images(self, rng: np.random.Generator, count: int, crowded: float) -> Tensor:
        crops = []
        for _ in range(count):
            scene = self.crowded(rng) if rng.random() < crowded else self.sample(rng)[1]
            x, y = rng.integers(0, scene2.SIZE - self.vae_side + 1, 2)
            crops.append(self.draw(scene)[y : y + self.vae_side, x : x + self.vae_side])
        pixels_B3HW = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return pixels_B3HW.contiguous(memory_format=torch.channels_last)

    def words(self, texts: Iterable[str] = ()) -> list[str]:
        return words2.words([*texts, "nothing"])

    def sentence(self, rng: np.random.Generator, scene: Any) -> str:
        """Its things, in half of the sentences the first one's place, and the background."""
        where = f" at the {words2.place(scene.things[0])}" if scene.things and rng.random() < 0.5 else ""
        return f"{words2.describe(scene)}{where} on a {scene.tone} background"

    def row(self, kind: str, rng: np.random.Generator, prompt: Any, scene: Any, instruction: str) -> Row:
        if kind == "plan":
            return user_turn(instruction.format(prompt=prompt.text)), words2.write_plan(scene, prompt), False
        if kind == "fill":
            if rng.random() < 0.5:
                return chat_text(prompt.text), " " + said_again(prompt.spec), False
            plan = words2.write_plan(scene, prompt)
            return chat_text(join_plan(prompt.text, plan)), " " + by_place(rng, scene, prompt), False
        image = "<|vision_start|>" + "<|image_pad|>" * CELLS**2 + "<|vision_end|>"
        question, answer = words2.sample_question(rng, scene)
        return user_turn(image + question), answer, False

    def probe(self, width: int) -> Probe:
        return FreeProbe(width)


def said_again(spec: captions2.Spec) -> str:
    """A prompt's things one by one in their first wording: "red circle above blue square"."""
    told = [" ".join(filter(None, (size, colour, shape))) for shape, colour, size in spec.things]
    if spec.relation:
        told = [f"{told[0]} {spec.relation} {told[1]}", *told[2:]]
    return " and ".join(told) + (f" {spec.tone} background" if spec.tone else "")


def by_place(rng: np.random.Generator, scene: scene2.Scene, prompt: captions2.Prompt) -> str:
    """What stands at each place that holds something, and at some others nothing, in random order."""
    held: dict[str, list[str]] = {}
    for thing in words2.in_prompt_order(scene, prompt):
        held.setdefault(words2.place(thing), []).append(words2.words_of(thing))
    places = [place for place in words2.PLACES if place in held or rng.random() < 0.25]
    return ", ".join(f"{places[i]} {' '.join(held.get(places[i], ['nothing']))}" for i in rng.permutation(len(places)))


class FreeProbe(Probe):
    """Reads of a token's cell which thing covers most of it, that thing's size and offset (in cells), the tone, and the
    cell's colours on a 4x4 grid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        kinds = len(scene2.COLOURS) * len(scene2.SHAPES)
        self.sizes = [1 + kinds, len(scene2.RADII), 2, len(scene2.TONES), 48]
        self.head = nn.Linear(width, sum(self.sizes))

    def loss(self, latents_BPD: Tensor, scenes: Sequence[Any], pixels_BHW3: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of thing, size and tone plus squared errors of offset and colours; size and offset count where
        there is a thing, and a cell without one counts less."""
        thing_BPK, size_BPK, offset_BP2, tone_BPK, colour_BPK = self.head(latents_BPD).split(self.sizes, -1)
        held = zip(*map(covered, scenes), strict=True)
        kind_BP, true_size_BP, true_offset_BP2 = (torch.from_numpy(np.stack(part)) for part in held)
        tone_BP = torch.tensor([[*scene2.TONES].index(scene.tone) for scene in scenes])[:, None].expand_as(kind_BP)
        small = pixels_BHW3.permute(0, 3, 1, 2).float().div(127.5).sub(1).unflatten(3, (CELLS, 4, 4))
        small = small.unflatten(2, (CELLS, 4, 4)).mean((4, 7)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        on_BP, cross = kind_BP > 0, nn.functional.cross_entropy
        kind = cross(thing_BPK.flatten(0, 1), kind_BP.flatten(), reduction="none").view_as(kind_BP)
        loss = 2 * (kind * torch.where(on_BP, 1.0, 0.3)).mean() + 0.5 * cross(size_BPK[on_BP], true_size_BP[on_BP])
        loss = loss + 0.1 * cross(tone_BPK.flatten(0, 1), tone_BP.flatten())
        offset = (offset_BP2 - true_offset_BP2).square().sum(-1)[on_BP].mean()
        colour = (colour_BPK - small).square().mean()
        right = (thing_BPK.argmax(-1) == kind_BP)[on_BP].float().mean()
        return loss + 0.5 * offset + 3 * colour, {"probe_right": right, "off": offset, "rgb": colour}


def covered(scene: scene2.Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each cell the kind of the thing that covers most of it (0 where that is under 4 %), its size's index, and the
    way to its centre in cells (x, y): (P,), (P,) int64, (P, 2) float32."""
    cover = np.full((len(scene.things) + 1, CELLS, CELLS), 0.04, np.float32)
    for index, thing in enumerate(scene.things, start=1):
        mask, half = np.zeros((scene2.SIZE, scene2.SIZE), np.float32), thing.reach
        mask[thing.y - half : thing.y + half, thing.x - half : thing.x + half] = draw2.sprite(thing.shape, thing.size)
        cover[index] = mask.reshape(CELLS, CELL, CELLS, CELL).mean((1, 3))
    kinds, sizes = np.zeros(CELLS**2, np.int64), np.zeros(CELLS**2, np.int64)
    offsets = np.zeros((CELLS**2, 2), np.float32)
    for cell, index in enumerate(cover.argmax(0).ravel()):
        if index:
            thing = scene.things[index - 1]
            colour = [*scene2.COLOURS].index(thing.colour)
            kinds[cell] = 1 + len(scene2.SHAPES) * colour + scene2.SHAPES.index(thing.shape)
            sizes[cell] = [*scene2.RADII].index(thing.size)
            offsets[cell] = thing.x / CELL - cell % CELLS - 0.5, thing.y / CELL - cell // CELLS - 0.5
    return kinds, sizes, offsets


CURRICULA: dict[str, Curriculum] = {"shapes": GridCurriculum(), "shapes-2": FreeCurriculum()}
