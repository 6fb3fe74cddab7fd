"""BifrostPipeline: prompts to images from Python, loaded once; the commands are callers of it.

As Kandinsky and Stable Cascade are split in diffusers, it is a prior (prompt to patch latents) and a decoder (patch
latents to image), each of which works alone.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache

from bifrost_cli.artifacts import Artifact
from bifrost_cli.config.schema import Recipe
from bifrost_cli.data.images import square
from bifrost_cli.errors import ArtifactError, UsageError, memory_errors
from bifrost_cli.generation import arguments, editing
from bifrost_cli.generation.arguments import BifrostPipelineOutput, ImageLike
from bifrost_cli.generation.choose_models import pretrained
from bifrost_cli.generation.requests import ImageRequest, read_prompts
from bifrost_cli.generation.stages import BifrostDecoder, BifrostPrior, PredictedLatents
from bifrost_cli.generation.step_callback import Interruption, StepCallback, step_callback
from bifrost_cli.loading.compatibility import require_base, require_one_step
from bifrost_cli.loading.loaders import ModelLoader, fingerprint
from bifrost_cli.loading.resolve import resolve_device
from bifrost_cli.models.encoders import Encoder
from bifrost_cli.runtime.ui import Ui


class BifrostPipeline:
    """Prior, decoder and image encoder of one recipe.

    Args:
        recipe: names of the frozen models and settings.
        branch: the trained branch; without it there is no prior.
        controlnet: the trained ControlNet; without it there is no decoder.
        device: as the option of the command line.
        one_half: keep only one of prior, decoder and encoder in memory, for a single pass over many images.
        in_memory: copy weights out of their files, so that these may change or go.
        ui: hears the plans and what was chosen.

    Attributes:
        interrupt: set it to True, from a callback or another thread, and the running call ends after its step.
    """

    def __init__(
        self, recipe: Recipe, branch: Artifact | None = None, controlnet: Artifact | None = None, *,
        device: str = "auto", one_half: bool = False, in_memory: bool = False, ui: Ui | None = None,
    ) -> None:  # fmt: skip
        self.recipe, self.branch, self.controlnet = recipe, branch, controlnet
        self.loader = ModelLoader(recipe.models, device, recipe.generate.offload, in_memory=in_memory)
        self.one_half, self.seconds, self.interrupt = one_half, dict[str, float](), False
        self._ui, self._said = ui or Ui(), ""
        self._prior: BifrostPrior | None = None
        self._decoder: BifrostDecoder | None = None
        self._encoder: Encoder | None = None
        self.lock = threading.RLock()  # one call at a time; a callback may call again

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: Path | str = "builtin", *, branch: Path | str | None = None,
        controlnet: Path | str | None = None, workspace: Path | str = "runs", sets: Sequence[str] = (),
        revision: str | None = None, device: str = "auto", ui: Ui | None = None,
    ) -> BifrostPipeline:  # fmt: skip
        """Load everything, once.

        Args:
            pretrained_name_or_path: `builtin`; a recipe's name or YAML file; an artifact's folder (a branch, a
                ControlNet or samples: its recipe and its weights); a folder of artifacts; or a hub id of such a folder.
            branch: a branch artifact instead of the one that would be chosen.
            controlnet: a ControlNet artifact likewise.
            workspace: where a recipe's artifacts are chosen from, as by `bifrost generate`.
            sets: recipe keys to change, each `section.key=value`.
            revision: of a hub id.
            device: `auto`, `cpu`, `cuda:1`, ...
            ui: told what was chosen and why.

        Raises:
            ArtifactError, RecipeError, EnvironmentProblem: what is named does not fit, cannot be used, or is not here.
        """
        ui = ui or Ui()
        recipe, models = pretrained(pretrained_name_or_path, branch, controlnet, workspace, sets, revision)
        ui.say(models.why)
        require_one_step(models.branch, recipe.generate.decode_steps)
        pipe = cls(recipe, models.branch, models.controlnet, device=device, in_memory=True, ui=ui)
        _ = pipe.prior, pipe.decoder
        return pipe

    @property
    def prior(self) -> BifrostPrior:
        """MLLM and branch, loaded when first used. ArtifactError BF-ART-001: the pipeline has no branch."""
        if self._prior is None:
            self._unload_others()
            if self.one_half and self.controlnet is not None:  # before hours of predicted latents, not after
                models = self.recipe.models
                require_base(self.controlnet, "painter", models.diffusion, fingerprint("diffusion", models))
            if self.branch is None:
                raise ArtifactError("this pipeline has no branch", fix="branch=FOLDER", code="BF-ART-001")
            self._prior = BifrostPrior(self.recipe, self.branch, self.loader)
            self._prior.seconds = self.seconds
        return self._prior

    @property
    def decoder(self) -> BifrostDecoder:
        """Diffusion model and ControlNet, loaded when first used. ArtifactError BF-ART-001: it has no ControlNet."""
        if self._decoder is None:
            self._unload_others()
            if self.controlnet is None:
                raise ArtifactError("this pipeline has no controlnet", fix="controlnet=FOLDER", code="BF-ART-001")
            self._decoder = BifrostDecoder(self.recipe, self.controlnet, self.loader, self._ui)
            self._decoder.seconds = self.seconds
        return self._decoder

    @property
    def encoder(self) -> Encoder:
        """The image encoder of `latents.encoder`; it shares the MLLM or the VAE with the half that is loaded."""
        if self._encoder is None:
            latents, images = self.recipe.latents, self.recipe.images
            if latents.encoder == "mllm" and self._prior is not None:
                return self.loader.encoder(latents, images, mllm=self._prior.mllm)
            if latents.encoder == "vae" and self._decoder is not None:
                return self.loader.encoder(latents, images, vae=self._decoder.diffusion.vae)
            self._unload_others()
            self._encoder = self.loader.encoder(latents, images)
        return self._encoder

    def _unload_others(self) -> None:
        if self.one_half:
            self._prior = self._decoder = self._encoder = None
            clear_device_cache(garbage_collection=True)

    @property
    def device(self) -> torch.device:
        """Where the parts compute."""
        return self.loader.policy.device

    def to(self, device: str | torch.device) -> BifrostPipeline:
        """Move to another device, where results differ at most in rounding: random numbers are drawn on the CPU."""
        return self._change(device=resolve_device(str(device)))

    def enable_model_cpu_offload(self) -> BifrostPipeline:
        """Keep each part in main memory until it works; the same bytes."""
        return self._change(offload="model")

    def enable_sequential_cpu_offload(self) -> BifrostPipeline:
        """Bring the layers of a part to the device one by one: the least memory, slow; the same bytes."""
        return self._change(offload="sequential")

    def _change(self, **place: Any) -> BifrostPipeline:
        with self.lock:
            halves = [half for half in (self._prior, self._decoder) if half is not None]
            self.loader.policy.change(*(module for half in halves for module in half.modules), **place)
            self.loader.device, self._encoder = self.device, None
            for cache in (cache for half in halves for cache in half.caches):
                cache.cache_clear()  # what is kept of the last prompt lies on the device of its time
        return self

    def __call__(
        self,
        prompt: str | Path | Sequence[str],
        *,
        num_images: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        decode_steps: int | None = None,
        branch_guidance: float | None = None,
        temperature: float | None = None,
        control_scale: float | None = None,
        plan: bool | str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> BifrostPipelineOutput:
        """Generate images; what is None is as the recipe says.

        Args:
            prompt: one, a list, or a file with one a line (Path).
            num_images: images of each prompt, with seeds that count up; `num_images_per_prompt` means the same.
            seed: of the first image of each prompt. (prompt, seed, settings, weights) decide an image's bytes: they are
                those of `bifrost generate --seed`, alone or among others.
            generator: instead of `seed`; one, or one for each image. Only its seed is read (see `seed_of`), so it can
                be on any device and means the same on each.
            num_inference_steps: diffusion steps (`generate.steps`).
            guidance_scale: the diffusion model's guidance.
            decode_steps: steps of the branch.
            branch_guidance: weight of the prompt in the branch.
            temperature: of a sampling head in the branch.
            control_scale: weight of the ControlNet.
            plan: let the MLLM write a dense description first; a text is read instead of what it would write.
            height: pixels a side; images are square, and the ControlNet fixes their size. `width` means the same.
            negative_prompt: refused: neither half was trained with one.
            output_type: `pil`, `np`, `pt` or `latent`; see `BifrostPipelineOutput`.
            callback_on_step_end: called as `callback(pipe, step, timestep, kwargs)` after each step of both loops.
                `kwargs` holds `latents` (a copy), `stage` (`decode`: patch latents, `timestep` is the number of patches
                still masked, `masked` (1, P) which; `diffusion`: VAE latents, 1000 to 0), `index`, `prompt` and `seed`.
                What it raises ends the call; `pipe.interrupt = True` ends it too, and returns the whole images.
            callback_on_step_end_tensor_inputs: `latents` is all there is.

        Raises:
            UsageError: an argument that cannot be used; the message says which can.
        """
        given = {"steps": num_inference_steps, "guidance_scale": guidance_scale, "decode_steps": decode_steps,
                 "branch_guidance": branch_guidance, "temperature": temperature, "control_scale": control_scale,
                 "plan": plan}  # fmt: skip
        settings = arguments.settings_of(self.recipe.generate, given)
        if self.branch is not None:
            require_one_step(self.branch, settings.decode_steps)
        arguments.refuse(negative_prompt, output_type, callback_on_step_end_tensor_inputs)
        prompts, side = read_prompts(prompt, self._ui), arguments.side_of(height, width)
        requests = arguments.requests_of(prompts, num_images, num_images_per_prompt, seed, generator, plan)
        with self.lock:
            if side is not None:
                arguments.require_side(side, self.decoder, self.prior.branch.patches)
            self.interrupt, before = False, dict(self.seconds)
            images, predicted, interrupted = [], [], False
            try:
                for request in requests:
                    on_step = step_callback(self, callback_on_step_end, request, interruptible=True)
                    latents = self.predict(request, settings=settings, callback=on_step)
                    options = {"settings": settings, "output_size": side, "callback": on_step}
                    images.append(self.image_of(request, latents.latents_PC, output_type, **options))
                    predicted.append(latents)
            except Interruption:
                interrupted = True
        made = requests[: len(images)]
        return self.output(made, images, predicted, before, output_type, interrupted=interrupted)

    def output(
        self, requests: Sequence[ImageRequest], images: list[Any], predicted: Sequence[PredictedLatents],
        before: dict[str, float], output_type: str, **more: Any,
    ) -> BifrostPipelineOutput:  # fmt: skip
        """What a call returns; `before` is what `seconds` was at its start."""
        spent = {key: now - before.get(key, 0.0) for key, now in self.seconds.items()}
        return BifrostPipelineOutput(
            images=arguments.stacked(images, output_type),
            latents=torch.stack([latents.latents_PC for latents in predicted]) if predicted else torch.empty(0),
            plans=[latents.plan for latents in predicted],
            prompts=[request.prompt for request in requests],
            seeds=[request.seed for request in requests],
            cut=[self.cuts(*pair) for pair in zip(requests, predicted, strict=True)],
            timings={stage: seconds for stage, seconds in spent.items() if seconds},
            **more,
        )

    def encode(self, image: ImageLike) -> torch.Tensor:
        """Patch latents (P, C), float32 on the CPU, of the centre square of a PIL image, uint8 array or file."""
        rgb = arguments.pixels_of(image, self.recipe.images)
        with self.lock, torch.no_grad():
            encoder, shared = self.encoder, list[torch.nn.Module]()
            if self._encoder is None and self.recipe.latents.encoder == "mllm" and self._prior is not None:
                shared = [self._prior.mllm.model]  # not its own: it lies where the half lies
            elif self._encoder is None and self._decoder is not None:
                shared = [self._decoder.diffusion.vae]
            with self.loader.policy.on(*shared):
                pixels_BHWC = square(rgb, encoder.image_size)[None].copy()  # Pillow lends a read-only array
                return encoder.encode(pixels_BHWC)[0].float().cpu()

    def decode(
        self, latents: torch.Tensor, prompt: str = "", *, seed: int | None = None,
        generator: torch.Generator | None = None, num_inference_steps: int | None = None,
        guidance_scale: float | None = None, control_scale: float | None = None, height: int | None = None,
        output_type: str = "pil", callback_on_step_end: StepCallback | None = None,
    ) -> Any:  # fmt: skip
        """The image of patch latents (P, C): from `encode`, or of an earlier call. Arguments as of a call.

        With the empty prompt it is what `bifrost reconstruct` writes. Only a callback that raises ends it early.
        """
        given = {"steps": num_inference_steps, "guidance_scale": guidance_scale, "control_scale": control_scale}
        settings = arguments.settings_of(self.recipe.generate, given)
        arguments.refuse(None, output_type, ("latents",))
        if not isinstance(latents, torch.Tensor) or latents.ndim != 2:
            raise UsageError("patch latents are a tensor (P, C)", at=f"got {getattr(latents, 'shape', type(latents))}",
                             fix="give those of one image, as encode returns them")  # fmt: skip
        (request,), side = arguments.requests_of([prompt], 1, 1, seed, generator), arguments.side_of(height, None)
        with self.lock:
            if side is not None:
                arguments.require_side(side, self.decoder, len(latents))
            on_step = step_callback(self, callback_on_step_end, request)
            image = self.image_of(request, latents, output_type, settings=settings, output_size=side, callback=on_step)
            images = arguments.stacked([image], output_type)
        return images[0] if output_type == "pil" else images

    def edit(
        self,
        image: ImageLike,
        prompt: str,
        *,
        mask_image: ImageLike | None = None,
        box: Sequence[float] | None = None,
        region: str | None = None,
        strength: float = 1.0,
        keep_pixels: bool = False,
        seed: int = 0,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        **settings: Any,
    ) -> BifrostPipelineOutput:
        """Predict a part of an image again, from the prompt and from the patches that stay, and render the whole.

        Args:
            image: a PIL image, uint8 array or file; its centre square is read.
            prompt: what the whole image shall show.
            mask_image: of the image's size, white where it is to change; it grows to whole patches. One of
                `mask_image`, `box` and `region` is needed.
            box: (x, y, width, height) in px of the image.
            region: words for what is to change; the MLLM says where it is.
            strength: share of the marked patches that are predicted again, at random; 1 is all of them.
            keep_pixels: pixels of patches that stay are the original's, with a soft seam.
            seed: (image, mask, prompt, seed, settings, weights) decide the bytes.
            settings: as of a call, from `num_inference_steps` to `plan`.

        Returns:
            One image; `latents` are those of the whole image, and `masked` (1, P) is True for what was predicted.

        Raises:
            UsageError: a mask of another size, an empty or full one; a region that the MLLM does not find.
            ArtifactError: the branch was trained on latents of another encoder.
        """
        rgb = arguments.pixels_of(image, self.recipe.images)
        patches = editing.marked(self, rgb, mask_image, box, region)
        how = editing.How(patches, strength, keep_pixels, output_type, callback_on_step_end)
        return editing.predict_again(self, rgb, prompt, [seed], how, settings)

    def vary(
        self, image: ImageLike, prompt: str = "", *, num_images: int = 4, strength: float = 0.5, seed: int = 0,
        output_type: str = "pil", callback_on_step_end: StepCallback | None = None, **settings: Any,
    ) -> BifrostPipelineOutput:  # fmt: skip
        """Variations of an image: in each other patches, a share `strength` of them, are predicted again.

        Arguments as of `edit`; image i has seed `seed + i`. With the empty prompt only the patches that stay speak.
        """
        rgb = arguments.pixels_of(image, self.recipe.images)
        every = np.ones(self.encoder.grid[0] * self.encoder.grid[1], bool)
        how = editing.How(every, strength, False, output_type, callback_on_step_end)
        return editing.predict_again(self, rgb, prompt, [seed + i for i in range(num_images)], how, settings)

    def mix(
        self, image: ImageLike, other: ImageLike, *, weight: float | Sequence[float] = 0.5, prompt: str = "",
        seed: int = 0, output_type: str = "pil", **settings: Any,
    ) -> BifrostPipelineOutput:  # fmt: skip
        """Images of interpolated latents, (1 - weight) of the first and weight of the other; several weights make a
        strip. Other arguments as of `decode`. UsageError: a weight outside of 0 to 1."""
        return editing.mix(self, image, other, weight, prompt, seed, output_type, settings)

    def locate(self, image: ImageLike, region: str) -> list[tuple[float, float, float, float]]:
        """Boxes (x, y, width, height) in px of what `region` names, as the MLLM says. UsageError: it names no place."""
        with self.lock:
            return editing.locate(self, arguments.pixels_of(image, self.recipe.images), region)

    def predict(self, request: ImageRequest, **options: Any) -> PredictedLatents:
        """Patch latents of a request; options as `BifrostPrior.predict`. OutOfMemory names what needs less."""
        if options.get("known") is not None:
            options["known"] = tuple(part[None] for part in options["known"])
        return self.predict_batch([request], **options)[0]

    def predict_batch(self, requests: Sequence[ImageRequest], **options: Any) -> list[PredictedLatents]:
        """Patch latents of requests, in one pass; options as `BifrostPrior.predict_batch`. OutOfMemory as `predict`."""
        with self._memory_errors("predicting the latents of", requests):
            plans = [request.plan for request in requests if request.plan is not None] or None  # all or none have one
            predicted = self.prior.predict_batch(*arguments.texts_and_seeds(requests), plans=plans, **options)
        for request, one in zip(requests, predicted, strict=True):
            if one.plan is not None and self._said != request.prompt:
                self._ui.say(f"plan {request.index}: {one.plan}")
                self._said = request.prompt
        return predicted

    def render_batch(self, requests: Sequence[ImageRequest], predicted: Sequence[PredictedLatents]) -> np.ndarray:
        """The images of requests in one pass, uint8 (B, H, W, 3). OutOfMemory names what needs less."""
        prompts, seeds = arguments.texts_and_seeds(requests)
        latents_BPC = torch.stack([one.latents_PC for one in predicted])
        with self._memory_errors("generating", requests):
            return self.decoder.decode_batch(self.decoder.denoise_batch(prompts, latents_BPC, seeds))

    def _memory_errors(self, doing: str, requests: Sequence[ImageRequest]) -> AbstractContextManager[None]:
        less = f"--batch {len(requests) // 2}" if len(requests) > 1 else self.loader.policy.needs_less()
        return memory_errors(f"{doing} {requests[0].name}", less)

    def cuts(self, request: ImageRequest, predicted: PredictedLatents) -> bool:
        """True when any model read less than the whole prompt or plan."""
        return predicted.cut or self.decoder.diffusion.too_long(request.prompt, self.decoder.text_tokens)

    def image_of(
        self, request: ImageRequest, latents_PC: torch.Tensor, output_type: str = "pil", **options: Any
    ) -> Any:
        """Pixels, uint8 (H, W, 3), or the VAE latents (c, h, w) of `latent`; options as `BifrostDecoder.denoise`."""
        with memory_errors(f"generating {request.name}", self.loader.policy.needs_less()):
            vae_latents_Bchw = self.decoder.denoise(request.prompt, latents_PC, request.seed, **options)
            return vae_latents_Bchw[0] if output_type == "latent" else self.decoder.decode(vae_latents_Bchw)
