"""Colours, fonts and sizes of the page. System fonts only, so that the page requests nothing from other hosts."""

from __future__ import annotations

from pathlib import Path

from gradio import themes

# Added to the head and not passed as `css`, whose selectors Gradio rewrites: media queries would not apply outside the
# tabs, `:is(a, b)` would be split at its comma, and container queries would be dropped.
_HERE = Path(__file__).resolve().parent
# uPlot draws the charts. It is part of the page, because pages request nothing from other hosts.
HEAD = "".join(
    f"<{tag}>{(_HERE / file).read_text(encoding='utf-8')}</{tag}>"
    for tag, file in (
        ("style", "vendor/uPlot-1.6.32.min.css"),
        ("style", "style.css"),
        ("script", "session.js"),
        ("script", "dom.js"),
        ("script", "vendor/uPlot-1.6.32.iife.min.js"),
        ("script", "line_plot.js"),
    )
)
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Ubuntu", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")


def theme() -> themes.Base:
    """Create the theme. The contrast of text is at least 4.5:1 in light and dark mode."""
    base = themes.Default(
        primary_hue=themes.colors.blue,
        secondary_hue=themes.colors.blue,
        neutral_hue=themes.colors.slate,
        text_size=themes.sizes.text_sm,
        spacing_size=themes.sizes.spacing_sm,
        radius_size=themes.sizes.radius_md,
        font=FONTS,
        font_mono=MONO,
    )
    return base.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_700",
        block_title_text_weight="600",
        block_shadow="none",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white",
        button_cancel_background_fill="#b91c1c",
        button_cancel_background_fill_hover="#991b1b",
        button_cancel_background_fill_dark="#b91c1c",
        button_cancel_text_color="white",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        slider_color="*primary_600",
    )
