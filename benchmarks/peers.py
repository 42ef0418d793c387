"""What the engine is compared with: lightly's SimCLR on CIFAR-10 as its own benchmark runs it, and ours beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from lightly.loss import NTXentLoss
from lightly.models import ResNetGenerator
from lightly.models.modules.heads import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from blto.data.images import ImageSet
from blto.data.view_source import view_source
from blto.data.views import resolve_recipe
from blto.pretraining.loop import batch_rows, build_method
from blto.pretraining.spec import PretrainingSpec
from blto.pretraining.trainer import Trainer
from blto.runtime.device import Precision, fabric
from blto.runtime.distributed import joined, process_count, share

Work = Callable[[], int]


class PILImages(Dataset[list[Tensor]]):
    """CIFAR-10 in memory as PIL images through lightly's transform, as torchvision's data set class hands them out."""

    def __init__(self, images: ImageSet) -> None:
        self.arrays = np.ascontiguousarray(np.asarray(images.images).transpose(0, 2, 3, 1))
        self.transform = SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0)

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> list[Tensor]:
        views: list[Tensor] = self.transform(Image.fromarray(self.arrays[index]))
        return views


def loader(images: ImageSet, batch_size: int, workers: int) -> Iterator[list[Tensor]]:
    """Endless batches of two views."""
    while True:
        yield from DataLoader(PILImages(images), batch_size, shuffle=True, drop_last=True, num_workers=workers)


class LightlySimCLR(nn.Module):
    """Backbone, head and loss of lightly's CIFAR-10 benchmark; one forward pass a view."""

    def __init__(self, width: int) -> None:
        super().__init__()
        resnet = ResNetGenerator("resnet-18", width=width / 64)
        self.backbone = nn.Sequential(*list(resnet.children())[:-1], nn.AdaptiveAvgPool2d(1))
        self.head = SimCLRProjectionHead(8 * width, 512, 128)
        self.criterion = NTXentLoss(gather_distributed=process_count() > 1)

    def forward(self, views: list[Tensor]) -> Tensor:
        """The loss."""
        first, second = (self.head(self.backbone(view).flatten(start_dim=1)) for view in views)
        loss: Tensor = self.criterion(first.float(), second.float())
        return loss


class LightlyStep:
    """A training step of lightly's model: fp32 as it ships, or bf16 autocast with channels-last."""

    def __init__(self, width: int, *, bf16: bool, device: str = "cpu") -> None:
        model = LightlySimCLR(width)
        if bf16:
            model.to(memory_format=torch.channels_last)
        self.backbone, self.bf16, self.device = model.backbone, bf16, device
        self.model = joined(model.to(fabric(device).device))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=6e-2, momentum=0.9, weight_decay=5e-4)

    def __call__(self, views: list[Tensor]) -> None:
        """Take the step."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            loss = self.model(views)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def lightly_as_shipped(images: ImageSet, width: int, batch_size: int, steps: int, workers: int = 0) -> Work:
    """End to end: its loader, its transform, fp32. Workers live on between turns, and the batches that they have
    made by the start of a turn are not charged to it."""
    step, found = LightlyStep(width, bf16=False), loader(images, batch_size, workers)

    def work() -> int:
        for _ in range(steps):
            step(next(found))
        return steps * batch_size

    return work


class OurData:
    """Batches of two views as the pretraining loop draws them."""

    def __init__(self, images: ImageSet, batch_size: int, device: str = "cpu") -> None:
        self.views = view_source(images.images, resolve_recipe("simclr_cifar"), fabric(device).device)
        self.size, self.batch_size, self.step = len(images), batch_size, 0

    def __next__(self) -> list[Tensor]:
        epoch, batch = divmod(self.step, self.size // self.batch_size)
        rows = batch_rows(self.size, self.batch_size, seed=0, epoch=epoch, batch=batch)
        self.step += 1
        return self.views(share(rows), seed=0, epoch=epoch)


def lightly_on_our_data(
    images: ImageSet, width: int, batch_size: int, steps: int, *, bf16: bool = True, device: str = "cpu"
) -> Work:
    """Lightly's model and loss, in bf16 under autocast and channels-last, fed by our views."""
    step, data = LightlyStep(width, bf16=bf16, device=device), OurData(images, batch_size, device)

    def work() -> int:
        for _ in range(steps):
            step(next(data))
        return steps * batch_size

    return work


def ours(
    images: ImageSet, width: int, batch_size: int, steps: int, *, precision: Precision = "auto", device: str = "cpu"
) -> Work:
    """End to end: our views and our trainer, on ResNet-18 of the same width."""
    spec = PretrainingSpec.model_validate(
        {"method": "simclr", "backbone": {"name": "resnet18", "width": width}, "batch_size": batch_size}
    )
    method = build_method(spec, seed=0, image_size=images.image_size)
    trainer = Trainer(
        method,
        optimizer=spec.optimizer,
        total_steps=10**6,
        device=device,
        precision=precision,
        cuda_graphs=True,
    )
    data = OurData(images, batch_size, device)

    def work() -> int:
        for _ in range(steps):
            trainer.train_step(next(data))
        return steps * batch_size

    return work


def augmentation(images: ImageSet, batch_size: int) -> dict[str, Work]:
    """Two views of each image in one process: ours over many batches, lightly's transform over one."""
    data, theirs = OurData(images, batch_size), PILImages(images)

    def own() -> int:
        for _ in range(40):
            next(data)
        return 40 * batch_size

    def lightly() -> int:
        for index in range(batch_size):
            theirs[index]
        return batch_size

    return {"ours": own, "lightly": lightly}
