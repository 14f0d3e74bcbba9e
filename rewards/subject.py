"""The subject of a photo: faces, people and salient regions, and how much of it a crop keeps.

Faces are found by MediaPipe's short-range detector, people by its selfie segmentation (`assets/models`); both run in
OpenCV. Salient regions are found where the photo's colours stand out against its surroundings (Achanta, Hemami, Estrada
and Suesstrunk, "Frequency-tuned salient region detection", 2009) at two scales, and where it has detail.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from rewards import image_metrics

MODELS = Path(__file__).resolve().parents[1] / "assets" / "models"
FACE_CONFIDENCE = 0.6
_FACE_INPUT, _PEOPLE_INPUT = 128, 256  # px
_TILE = 0.6  # side of the tiles that are searched for small faces, as a share of the photo
_HEAD = (0.25, 0.55, 0.25, 0.25)  # hair, ears and chin around a face's box: left, top, right, bottom, share of its size

Box = tuple[float, float, float, float]  # left, top, right, bottom, 0..1 of the photo


@dataclass(frozen=True)
class Subject:
    """What a photo shows.

    Attributes:
        heads: Boxes of the heads, 0..1 of the photo.
        importance: float32 [h, w] at most `image_metrics.SMALL_SIDE` px: importance of each place, with sum 1.
        people: Share of the photo that people cover, 0..1.
    """

    heads: tuple[Box, ...]
    importance: np.ndarray
    people: float


def find_subject(photo: np.ndarray) -> Subject:
    """Find the subject of a photo (uint8 [H, W, 3] RGB)."""
    heads = tuple(_head(box) for box in find_faces(photo))
    importance = saliency(photo)
    height, width = importance.shape
    mask = people_mask(photo, (width, height))
    people = float((mask > 0.5).mean())
    if 0.01 < people < 0.9 and heads:
        importance = importance / importance.sum() + mask / mask.sum()
    for left, top, right, bottom in heads:
        region = np.zeros_like(importance)
        y0, y1 = int(top * height), max(int(top * height) + 1, round(bottom * height))
        x0, x1 = int(left * width), max(int(left * width) + 1, round(right * width))
        region[y0:y1, x0:x1] = 1
        if region.any():
            importance = importance / importance.sum() + region / region.sum()
    return Subject(heads, (importance / max(importance.sum(), 1e-9)).astype(np.float32), people)


def _head(face: Box) -> Box:
    left, top, right, bottom = face
    width, height = right - left, bottom - top
    return (
        max(0.0, left - _HEAD[0] * width),
        max(0.0, top - _HEAD[1] * height),
        min(1.0, right + _HEAD[2] * width),
        min(1.0, bottom + _HEAD[3] * height),
    )


def saliency(photo: np.ndarray) -> np.ndarray:
    """Return the salience float32 [h, w] of a photo (uint8 RGB), 0 for its background, at most 64 px wide or high."""
    lab = image_metrics.to_lab(image_metrics.downscale(photo))
    scale = max(lab.shape[:2])
    fine, coarse = (cv2.GaussianBlur(lab, (0, 0), share * scale) for share in (0.015, 0.25))
    stands_out = np.linalg.norm(fine - lab.mean((0, 1)), axis=-1) / 2 + np.linalg.norm(fine - coarse, axis=-1) / 2
    light = np.ascontiguousarray(lab[..., 0])
    detail = np.hypot(cv2.Sobel(light, cv2.CV_32F, 1, 0), cv2.Sobel(light, cv2.CV_32F, 0, 1))
    detail = cv2.GaussianBlur(detail, (0, 0), 0.04 * scale)
    height, width = light.shape
    y, x = np.mgrid[0:height, 0:width]
    centre = np.exp(-(((x / max(1, width - 1) - 0.5) ** 2 + (y / max(1, height - 1) - 0.5) ** 2) / (2 * 0.28**2)))
    parts = [part / max(float(part.mean()), 1e-3) for part in (stands_out, detail)]
    combined = cv2.GaussianBlur(((parts[0] * parts[1]) ** 0.5 * centre).astype(np.float32), (0, 0), 0.02 * scale)
    return np.maximum(combined - 0.3 * combined.max(), 0) + 1e-6


_import_lock = threading.Lock()  # the importer fails at times if threads use it at once: 1 of 200 processes


class _Networks:
    """The two networks of a thread; OpenCV's are not safe to share."""

    def __init__(self) -> None:
        files = ("face_detection_short_range.tflite", "selfie_segmentation.tflite")
        with _import_lock:
            self.faces, self.people = (
                cv2.dnn.readNetFromTFLite(str(MODELS / file), engine=cv2.dnn.ENGINE_CLASSIC) for file in files
            )


_local = threading.local()


def _networks() -> _Networks:
    if not hasattr(_local, "networks"):
        _local.networks = _Networks()
    return _local.networks


def find_faces(photo: np.ndarray) -> list[Box]:
    """Return the boxes of the faces in a photo (uint8 RGB), largest first; small ones are found in tiles of it."""
    tiles = [(0.0, 0.0, 1.0)] + [(x, y, _TILE) for y in (0.0, 1 - _TILE) for x in (0.0, 1 - _TILE)]
    tiles.append(((1 - _TILE) / 2, (1 - _TILE) / 2, _TILE))
    height, width = photo.shape[:2]
    boxes, confidences = [], []
    for left, top, size in tiles:
        x0, y0 = int(left * width), int(top * height)
        tile = photo[y0 : y0 + max(1, round(size * height)), x0 : x0 + max(1, round(size * width))]
        for confidence, (x, y, w, h) in _detect(tile):
            boxes.append((x + x0, y + y0, w, h))
            confidences.append(confidence)
    keep = cv2.dnn.NMSBoxes(boxes, confidences, FACE_CONFIDENCE, 0.3) if boxes else []
    found = [
        (max(0.0, x / width), max(0.0, y / height), min(1.0, (x + w) / width), min(1.0, (y + h) / height))
        for x, y, w, h in (boxes[int(index)] for index in np.ravel(keep))
    ]
    return sorted(found, key=lambda box: (box[0] - box[2]) * (box[3] - box[1]))


def _detect(tile: np.ndarray) -> list[tuple[float, tuple[float, float, float, float]]]:
    """Return confidence and left, top, width, height in pixels of each face candidate in a tile (uint8 RGB)."""
    scale = _FACE_INPUT / max(tile.shape[:2])
    size = max(1, round(tile.shape[1] * scale)), max(1, round(tile.shape[0] * scale))
    canvas = np.zeros((_FACE_INPUT, _FACE_INPUT, 3), np.uint8)
    canvas[: size[1], : size[0]] = cv2.resize(tile, size, interpolation=cv2.INTER_AREA)
    network = _networks().faces
    network.setInput(cv2.dnn.blobFromImage(canvas, 1 / 127.5, mean=(127.5, 127.5, 127.5)))
    regressors, logits = network.forward(["regressors", "classificators"])
    confidence = 1 / (1 + np.exp(-np.clip(logits.reshape(-1), -50, 50)))
    boxes = regressors.reshape(-1, 16)
    found = []
    for index in np.flatnonzero(confidence >= FACE_CONFIDENCE):
        dx, dy, w, h = (float(value) for value in boxes[index, :4])
        x, y = _ANCHORS[index] * _FACE_INPUT + (dx, dy)
        found.append((float(confidence[index]), ((x - w / 2) / scale, (y - h / 2) / scale, w / scale, h / scale)))
    return found


def _face_anchors() -> np.ndarray:
    """Return the centres [896, 2] of the detector's anchors: 16 x 16 cells with 2 each, then 8 x 8 with 6 each."""
    grids = []
    for cells, repeat in ((16, 2), (8, 6)):
        y, x = np.mgrid[0:cells, 0:cells]
        grids.append(np.repeat((np.stack([x.ravel(), y.ravel()], 1) + 0.5) / cells, repeat, axis=0))
    return np.concatenate(grids)


_ANCHORS = _face_anchors()


def people_mask(photo: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return how likely each place shows a person, float32 [h, w] 0..1, for a size (w, h)."""
    network = _networks().people
    square = cv2.resize(photo, (_PEOPLE_INPUT, _PEOPLE_INPUT), interpolation=cv2.INTER_AREA)
    network.setInput(cv2.dnn.blobFromImage(square, 1 / 255))
    mask = network.forward().reshape(_PEOPLE_INPUT, _PEOPLE_INPUT)
    return np.clip(cv2.resize(mask, size, interpolation=cv2.INTER_AREA), 0, 1)


@dataclass(frozen=True)
class Framing:
    """What a crop keeps.

    Attributes:
        kept: Share of the area, 0..1.
        subject_lost: Share of the importance that is outside, 0..1.
        subject_cut: Mean importance along the new edges, in multiples of the photo's mean: high if a subject is cut.
        head_lost: Largest share of a head that is outside, 0..1.
        aspect: Absolute logarithm of the change of the ratio of width to height.
    """

    kept: float
    subject_lost: float
    subject_cut: float
    head_lost: float
    aspect: float


def framing(subject: Subject, box: Box) -> Framing:
    """Measure what a crop (box 0..1 of the photo's content) keeps of a subject."""
    left, top, right, bottom = box
    height, width = subject.importance.shape
    x0, y0 = min(max(0, round(left * width)), width - 1), min(max(0, round(top * height)), height - 1)
    x1, y1 = max(x0 + 1, round(right * width)), max(y0 + 1, round(bottom * height))
    inside = subject.importance[y0:y1, x0:x1]
    edges = [
        inside[:, 0].sum() / height * (left > 0.005),
        inside[:, -1].sum() / height * (right < 0.995),
        inside[0].sum() / width * (top > 0.005),
        inside[-1].sum() / width * (bottom < 0.995),
    ]
    return Framing(
        kept=min(1.0, max(0.0, (right - left) * (bottom - top))),
        subject_lost=float(min(1.0, max(0.0, 1 - inside.sum()))),
        subject_cut=float(sum(edges)) * subject.importance.size,
        head_lost=max((_share_outside(head, box) for head in subject.heads), default=0.0),
        aspect=abs(float(np.log(max(right - left, 1e-3) / max(bottom - top, 1e-3)))),
    )


def _share_outside(head: Box, box: Box) -> float:
    width = max(0.0, min(head[2], box[2]) - max(head[0], box[0]))
    height = max(0.0, min(head[3], box[3]) - max(head[1], box[1]))
    return float(1 - width * height / max(1e-9, (head[2] - head[0]) * (head[3] - head[1])))
