"""A trained image classifier as one file that needs nothing of this project.

Dimensions: N images, H height, W width, C channels, K classes.
"""

import json
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from core.errors import UserError, needed
from core.files import atomic_write
from datamodules.images.base import ImageDataModule
from lit_models.base import LitModel
from lit_models.classification import LitClassifier, views

LARGEST = 1e-3  # difference of a probability from PyTorch's; float32 on another engine has 1e-6

Runner = Callable[[Tensor], np.ndarray]  # images (N, H, W, C) -> probabilities (N, K)


class ImagesToProbabilities(nn.Module):
    """Normalization, network and the views of test-time augmentation in one."""

    scale: Tensor
    shift: Tensor

    def __init__(self, model: LitClassifier, data: ImageDataModule) -> None:
        super().__init__()
        self.network = model.network
        self.tta = model.tta
        self.register_buffer("scale", 1 / (255 * data.std))
        self.register_buffer("shift", data.mean / data.std)

    def forward(self, images: Tensor) -> Tensor:  # uint8 (N, H, W, C) -> (N, K)
        pixels = (images.float() * self.scale - self.shift).permute(0, 3, 1, 2)
        logits = [weight * self.network(view) for weight, view in views(pixels, self.tta)]
        return torch.stack(logits).sum(0).softmax(1)


def export(model: LitModel, path: Path) -> None:
    """Write the model to a file, if both give the same probabilities on the validation part.

    Args:
        model: That of a run, with its data module.
        path: File to write, ``.onnx`` for engines of ONNX or ``.pt2`` for ``torch.export.load``.

    Raises:
        UserError: It is no image classifier, cannot be exported, or gives something else.
    """
    data = model.data
    if not isinstance(model, LitClassifier) or not isinstance(data, ImageDataModule):
        raise UserError(
            f"a {type(model).__name__} on {type(data).__name__} is no classifier of images, and "
            "only these are exported; use it in Python with lit_models.load."
        )
    images = held_out(data)
    network = ImagesToProbabilities(model, data).eval()
    sizes = ({0: Dim("batch")},)
    try:
        program = torch.export.export(network, (images[:2],), dynamic_shapes=sizes)
    except Exception as error:  # torch raises many types at what it cannot trace
        raise UserError(
            f"{type(model.network).__name__} cannot be exported: {str(error).splitlines()[0]}"
        ) from error
    content, run = FORMATS[path.suffix](program, json.dumps(data.class_names))
    model.run_precision = "32-true"  # as the file has it
    expected = model.predict(images, accelerator="cpu").probabilities
    found = np.concatenate([run(part) for part in images.split(256)])
    difference = float(np.abs(found - expected).max())
    equal = int((found.argmax(1) == expected.argmax(1)).sum())
    compared = f"{difference:.1e} from PyTorch's, {equal:,} of {len(images):,} labels equal"
    if not difference < LARGEST:
        raise UserError(f"{path} is not written: its probabilities are up to {compared}.")
    with atomic_write(path) as file:
        file.write(content)
    shape = ", ".join(map(str, data.image_size))
    print(f"{path}: uint8 (N, {shape}) in, probabilities (N, {found.shape[1]}) out,")
    print(f"on the validation part at most {compared}.")


def held_out(data: ImageDataModule) -> Tensor:
    """The images of the validation part; of a run without one, those to predict."""
    if not data.validates:
        return data.read_predict()[0]
    data.prepare_data()
    data.setup("validate")
    return data.splits["val"][0]


def to_onnx(program: ExportedProgram, classes: str) -> tuple[bytes, Runner]:
    """The file, with the class names as JSON in its metadata, and a function that runs it."""
    onnx, runtime = (needed(name, "--export FILE.onnx") for name in ("onnx", "onnxruntime"))
    needed("onnxscript", "--export FILE.onnx")
    names = {"input_names": ["images"], "output_names": ["probabilities"]}
    made = torch.onnx.export(program, dynamo=True, verbose=False, **names)  # type: ignore[arg-type]
    assert made is not None
    model = made.model_proto
    onnx.helper.set_model_props(model, {"classes": classes})
    content = model.SerializeToString()
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda images: session.run(None, {"images": images.numpy()})[0]


def to_pt2(program: ExportedProgram, classes: str) -> tuple[bytes, Runner]:
    """Return the file, with the extra file ``classes.json``, and a function that runs it."""
    file = BytesIO()
    with warnings.catch_warnings():  # of weights that share memory, as those on a CPU may
        warnings.filterwarnings("ignore", "No complete tensor found in the group")
        torch.export.save(program, file, extra_files={"classes.json": classes})
    file.seek(0)
    network = torch.export.load(file).module()
    return file.getvalue(), lambda images: network(images).detach().numpy()


FORMATS = {".onnx": to_onnx, ".pt2": to_pt2}
