"""The sample gallery: bundled photos that no training has seen, with their credits, as a strip of thumbnails."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

import cv2
import gradio as gr

from training.data.bundled import PHOTO_FOLDER, bundled_photos

THUMBNAIL_HEIGHT = 72  # pixels on the screen; files have twice as many


@dataclass(frozen=True)
class Sample:
    """One bundled photo and whom to thank for it."""

    file: str
    subject: str
    credit: str
    licence: str

    @property
    def path(self) -> Path:
        return PHOTO_FOLDER / self.file

    @property
    def thanks(self) -> str:
        """One line for under the photo."""
        return f"{self.subject[:1].upper()}{self.subject[1:]} · {self.credit} · {self.licence}"


def _load() -> dict[str, Sample]:
    """Return the held-out photos by file name; none if the folder is missing, so that the page still opens."""
    try:
        photos = bundled_photos("held-out")
    except OSError:
        return {}
    return {photo.path.name: Sample(photo.path.name, photo.subject, photo.credit, photo.licence) for photo in photos}


SAMPLES: dict[str, Sample] = _load()


def thumbnail(path: Path) -> str:
    """A small JPEG as a data URL; empty when the photo cannot be read."""
    small = cv2.imread(str(path), cv2.IMREAD_REDUCED_COLOR_4)
    if small is None:
        return ""
    done, coded = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 72])
    return "data:image/jpeg;base64," + base64.b64encode(coded.tobytes()).decode("ascii") if done else ""


def strip() -> gr.HTML:
    """The strip: buttons with thumbnails. It fires `choose` with the file name; its value is the chosen one."""
    photos = [
        {"file": sample.file, "thanks": sample.thanks, "src": thumbnail(sample.path)} for sample in SAMPLES.values()
    ]
    return gr.HTML(
        value="", photos=photos, html_template=_TEMPLATE, js_on_load=_SCRIPT, apply_default_css=False, elem_id="samples"
    )


_TEMPLATE = """
<div class="samples" role="group" aria-label="Sample photos">
  {{#each photos}}<button type="button" class="sample" data-file="{{file}}" aria-pressed="false" title="{{thanks}}">
    <img src="{{src}}" alt="{{thanks}}" loading="lazy" height="72"></button>{{/each}}
</div>
<p class="samples-thanks"></p>
"""

_SCRIPT = """
function mark() {
  let thanks = '';
  for (const button of element.querySelectorAll('.sample')) {
    const chosen = button.dataset.file === props.value;
    button.setAttribute('aria-pressed', String(chosen));
    if (chosen) { thanks = button.title; button.scrollIntoView({block: 'nearest', inline: 'center'}); }
  }
  element.querySelector('.samples-thanks').textContent = thanks || 'Samples that no training has seen';
}
element.addEventListener('click', event => {
  const button = event.target.closest('.sample');
  if (button) { props.value = button.dataset.file; mark(); trigger('choose', {file: button.dataset.file}); }
});
// A name that comes from a link is chosen as if it had been clicked.
watch('value', () => { mark(); if (props.value) trigger('choose', {file: props.value}); });
mark();
"""
