"""Encoders and preprocessing against timm, transformers and torchvision themselves."""

import dataclasses

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from tests.parity.peers import peer
from timeviper_jax.conversion.load import load_params, save_params
from timeviper_jax.conversion.rules import place
from timeviper_jax.conversion.vision import (
    config_from_json,
    encoder_rules,
    encoder_unused,
)
from timeviper_jax.data.images import Fit, fill_of, normalise
from timeviper_jax.presets import ENCODERS
from timeviper_jax.vision.dinov2 import DinoV2Config
from timeviper_jax.vision.encoder import make_encoder
from timeviper_jax.vision.vit import VitConfig

timm, torch, transformers = peer("timm"), peer("torch"), peer("transformers")
transforms = peer("torchvision.transforms")

# Random weights of this size give features of a few units.
CLOSE = dict(atol=2e-5, rtol=2e-5)
SIZES = dict(patch_size=14, embed_dim=64, num_heads=4)
TIMM_IDS = {
    "siglip-vit-b16-224px": "vit_base_patch16_siglip_224",
    "siglip-vit-b16-256px": "vit_base_patch16_siglip_256",
    "siglip-vit-b16-384px": "vit_base_patch16_siglip_384",
    "siglip-vit-so400m": "vit_so400m_patch14_siglip_224",
    "siglip-vit-so400m-384px": "vit_so400m_patch14_siglip_384",
    "dinov2-vit-l": "vit_large_patch14_reg4_dinov2.lvd142m",
}


def _randomise(model):
    """No parameter special: those that start at zero or one are drawn too."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05 if parameter.ndim > 1 else 0.3)
    return model.eval()


def _tensors(module):
    return {name: t.numpy() for name, t in module.state_dict().items()}


def _loaded(cfg, tensors, source="release"):
    encoder = nnx.eval_shape(lambda: make_encoder(cfg, rngs=nnx.Rngs(0)))
    rules = encoder_rules(cfg, source)
    load_params(encoder, tensors, rules, ignore=encoder_unused(cfg))
    return encoder


def _assert_saved(encoder, tensors, source="release"):
    """What is written back is what was read, to the byte."""
    for name, tensor in save_params(
        encoder, encoder_rules(encoder.cfg, source)
    ).items():
        assert tensor.tobytes() == tensors[name].tobytes(), name


def _pixels(size):
    return np.random.default_rng(0).normal(size=(2, 3, size, size)).astype(np.float32)


def _assert_features(encoder, pixels, want):
    got = nnx.jit(lambda encoder, x: encoder(x))(encoder, pixels.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(got, want.numpy(), **CLOSE)


@pytest.mark.parametrize(
    ("timm_id", "cfg"),
    [
        (
            "vit_so400m_patch14_siglip_384",
            VitConfig(image_size=60, depth=3, mlp_dim=239, **SIZES),
        ),
        (
            "vit_large_patch14_reg4_dinov2.lvd142m",
            DinoV2Config(image_size=56, depth=3, mlp_dim=256, **SIZES),
        ),
    ],
)
def test_timms_features_and_tensors(timm_id, cfg):
    sizes = dict(embed_dim=64, depth=3, num_heads=4)
    model = timm.create_model(timm_id, num_classes=0, img_size=cfg.image_size, **sizes)
    tensors, pixels = _tensors(_randomise(model)), _pixels(cfg.image_size)
    encoder = _loaded(cfg, tensors)
    with torch.no_grad():
        (want,) = model.get_intermediate_layers(torch.from_numpy(pixels), n={1})
    _assert_features(encoder, pixels, want)
    _assert_saved(encoder, tensors)


@pytest.mark.parametrize("size", [42, 98])
def test_timm_resizes_positions_alike(size):
    trained = timm.create_model(
        "vit_large_patch14_reg4_dinov2.lvd142m",
        num_classes=0,
        img_size=70,
        embed_dim=64,
        depth=3,
        num_heads=4,
    )
    tensors, pixels = _tensors(_randomise(trained)), _pixels(size)
    trained.set_input_size((size, size))
    with torch.no_grad():
        (want,) = trained.get_intermediate_layers(torch.from_numpy(pixels), n={1})
    cfg = DinoV2Config(image_size=size, depth=3, mlp_dim=256, **SIZES)
    _assert_features(_loaded(cfg, tensors), pixels, want)


@pytest.mark.parametrize("name", TIMM_IDS)
def test_timms_full_size_has_a_place_for_every_tensor(name):
    with torch.device("meta"):
        model = timm.create_model(TIMM_IDS[name], num_classes=0)
    published = {n: tuple(p.shape) for n, p in model.state_dict().items()}
    cfg = ENCODERS[name]
    encoder = nnx.eval_shape(lambda: make_encoder(cfg, rngs=nnx.Rngs(0)))
    params = {
        "/".join(map(str, path)): param.shape
        for path, param in nnx.to_flat_state(nnx.state(encoder))
    }
    place(published, params, encoder_rules(cfg), ignore=encoder_unused(cfg))


def _on_disk(model, folder):
    """The tensors as transformers writes them, which is under their published names."""
    from safetensors.numpy import load_file

    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def test_transformers_siglip(tmp_path):
    config = transformers.SiglipVisionConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=56,
        patch_size=14,
        hidden_act="gelu",  # Theirs approximates it by default; timm's does not.
    )
    model, pixels = _randomise(transformers.SiglipVisionModel(config)), _pixels(56)
    with torch.no_grad():
        states = model(torch.from_numpy(pixels), output_hidden_states=True)
    cfg = config_from_json(config.to_dict())
    assert cfg == VitConfig(image_size=56, depth=3, mlp_dim=96, **SIZES)
    tensors = _on_disk(model, tmp_path)
    encoder = _loaded(cfg, tensors, "transformers")
    _assert_features(encoder, pixels, states.hidden_states[2])
    _assert_saved(encoder, tensors, "transformers")


def test_transformers_dinov2_with_registers(tmp_path):
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        mlp_ratio=4,
        image_size=56,
        patch_size=14,
        num_register_tokens=3,
    )
    model = _randomise(transformers.Dinov2WithRegistersModel(config))
    pixels = _pixels(56)
    with torch.no_grad():
        states = model(torch.from_numpy(pixels), output_hidden_states=True)
    cfg = DinoV2Config(
        image_size=56,
        depth=3,
        mlp_dim=256,
        num_registers=3,
        class_position=True,
        **SIZES,
    )
    assert config_from_json(config.to_dict()) == cfg
    tensors = _on_disk(model, tmp_path)
    encoder = _loaded(cfg, tensors, "transformers")
    _assert_features(encoder, pixels, states.hidden_states[2][:, 4:])
    _assert_saved(encoder, tensors, "transformers")


@dataclasses.dataclass
class _Letterbox:
    """The release's padding, in torchvision's terms."""

    fill: tuple[int, int, int]

    def __call__(self, image):
        longer = max(image.size)
        across, down = ((longer - side) // 2 for side in image.size)
        return transforms.functional.pad(image, (across, down), fill=self.fill)


@pytest.mark.parametrize("resize", ["resize-naive", "resize-crop", "letterbox"])
@pytest.mark.parametrize("name", ["siglip-vit-b16-224px", "dinov2-vit-l"])
def test_every_pixel_is_torchvisions(name, resize):
    cfg, rng = ENCODERS[name], np.random.default_rng(0)
    size = cfg.image_size
    fill = fill_of(cfg.mean)
    bicubic = transforms.InterpolationMode.BICUBIC
    scale = (size, size) if resize == "resize-naive" else size
    transform = transforms.Compose(
        [
            *([_Letterbox(fill)] if resize == "letterbox" else []),
            transforms.Resize(scale, interpolation=bicubic),
            transforms.CenterCrop((size, size)),
            transforms.ToTensor(),
            transforms.Normalize(cfg.mean, cfg.std),
        ]
    )
    fit = Fit(size=size, resize=resize, fill=fill)
    for shape in ((37, 301), (301, 37), (224, 225), (500, 333), (224, 224), (9, 8)):
        image = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
        want = transform(Image.fromarray(image)).permute(1, 2, 0).numpy()
        got = normalise(fit(image), cfg.mean, cfg.std)
        np.testing.assert_allclose(got, want, atol=1e-6)
