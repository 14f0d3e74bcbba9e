"""The sample gallery: a strip of bundled photos, the most appealing first, with their credits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import gradio as gr

from recipes import jpeg_data_url
from training.data.bundled import PHOTO_FOLDER, SAMPLE_FOLDER, bundled_photos

THUMBNAIL_QUALITY = 72  # JPEG
# Files of the samples in order; the last three have a flaw, on which an edit is visible.
ORDER = (
    "coffee.jpg",
    "flower.jpg",
    "china.jpg",
    "astronaut.jpg",
    "scene-loc7.jpg",
    "cincinnati-bridge.jpg",
    "mountain1.jpg",
    "chelsea.jpg",
    "rocket.jpg",
    "dark-city.jpg",
    "tinted-portrait.jpg",
    "framed-bee.jpg",
)
FOLDERS = (PHOTO_FOLDER, SAMPLE_FOLDER)


@dataclass(frozen=True)
class Sample:
    """A sample photo.

    Attributes:
        file: File name.
        subject: What it shows.
        credit: The author to credit.
        licence: Name of its licence.
        path: Path of the file.
        trained: Whether moondream-tiny was trained on it.
    """

    file: str
    subject: str
    credit: str
    licence: str
    path: Path
    trained: bool

    @property
    def caption(self) -> str:
        """Subject, credit and licence in one line."""
        subject = f"{self.subject[:1].upper()}{self.subject[1:]}"
        return " · ".join([subject, self.credit, self.licence] + ["used in training"] * self.trained)


def _load() -> dict[str, Sample]:
    """Return the samples by file name, in their order; none if a folder is missing, so that the page still opens."""
    try:
        photos = {photo.path.name: photo for folder in FOLDERS for photo in bundled_photos(folder=folder)}
    except OSError:
        return {}
    return {
        name: Sample(name, photo.subject, photo.credit, photo.licence, photo.path, photo.split == "train")
        for name in ORDER
        if (photo := photos.get(name))
    }


SAMPLES: dict[str, Sample] = _load()


def thumbnail(path: Path) -> str:
    """Return a small JPEG data URL, or an empty string if the photo cannot be read."""
    small = cv2.imread(str(path), cv2.IMREAD_REDUCED_COLOR_4)
    return "" if small is None else jpeg_data_url(cv2.cvtColor(small, cv2.COLOR_BGR2RGB), THUMBNAIL_QUALITY)


def sample_gallery(value: str = "") -> gr.HTML:
    """Create the component. Its value is the selected file name; a click on a sample triggers `choose` with {file}."""
    photos = [
        {"file": sample.file, "caption": sample.caption, "src": thumbnail(sample.path)} for sample in SAMPLES.values()
    ]
    return gr.HTML(
        value=value,
        photos=photos,
        html_template=_HTML,
        js_on_load=_JS,
        apply_default_css=False,
        elem_id="samples",
    )


_HTML = """
<div class="samples" role="group" aria-label="Sample photos">
  {{#each photos}}<button type="button" class="sample" data-file="{{file}}" aria-pressed="false" title="{{caption}}">
    <img src="{{src}}" alt="{{caption}}" loading="lazy" height="72"></button>{{/each}}
</div>
<p class="samples-caption"></p>
"""

_JS = """
function drawSelection() {
  let caption = '';
  for (const button of element.querySelectorAll('.sample')) {
    const selected = button.dataset.file === props.value;
    button.setAttribute('aria-pressed', String(selected));
    if (selected) { caption = button.title; button.scrollIntoView({block: 'nearest', inline: 'center'}); }
  }
  element.querySelector('.samples-caption').textContent = caption || 'Sample photos';
}
element.addEventListener('click', event => {
  const button = event.target.closest('.sample');
  if (button) { props.value = button.dataset.file; drawSelection(); trigger('choose', {file: button.dataset.file}); }
});
watch('value', drawSelection);
drawSelection();
"""
