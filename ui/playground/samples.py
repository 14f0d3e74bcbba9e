"""The sample gallery: a strip of held-out bundled photos, with their credits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import gradio as gr

from recipes import jpeg_data_url
from training.data.bundled import PHOTO_FOLDER, bundled_photos

THUMBNAIL_QUALITY = 72  # JPEG


@dataclass(frozen=True)
class Sample:
    """A sample photo.

    Attributes:
        file: File name.
        subject: What it shows.
        credit: The author to credit.
        licence: Name of its licence.
    """

    file: str
    subject: str
    credit: str
    licence: str

    @property
    def path(self) -> Path:
        """Path of the file."""
        return PHOTO_FOLDER / self.file

    @property
    def caption(self) -> str:
        """Subject, credit and licence in one line."""
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
    """Return a small JPEG data URL, or an empty string if the photo cannot be read."""
    small = cv2.imread(str(path), cv2.IMREAD_REDUCED_COLOR_4)
    return "" if small is None else jpeg_data_url(cv2.cvtColor(small, cv2.COLOR_BGR2RGB), THUMBNAIL_QUALITY)


def sample_gallery() -> gr.HTML:
    """Create the component. Its value is the selected file name; it triggers `choose` with {file}."""
    photos = [
        {"file": sample.file, "caption": sample.caption, "src": thumbnail(sample.path)} for sample in SAMPLES.values()
    ]
    return gr.HTML(
        value="",
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
  element.querySelector('.samples-caption').textContent = caption || 'Sample photos, not used in training';
}
element.addEventListener('click', event => {
  const button = event.target.closest('.sample');
  if (button) { props.value = button.dataset.file; drawSelection(); trigger('choose', {file: button.dataset.file}); }
});
// A sample that is set by a link loads like one that is clicked.
watch('value', () => { drawSelection(); if (props.value) trigger('choose', {file: props.value}); });
drawSelection();
"""
