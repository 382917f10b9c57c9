"""Colours, with a contrast of at least 4.5 to 1 for every text, in light and dark; fonts of the system only."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

ASSETS = Path(__file__).parent / "assets"


def theme() -> gr.themes.Base:
    system = ("system-ui", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif")
    mono = ("ui-monospace", "Consolas", "Menlo", "monospace")
    colours = {
        "button_primary_background_fill": "*primary_700",
        "button_primary_background_fill_hover": "*primary_800",
        "button_primary_text_color": "white",
        "button_cancel_background_fill": "#b91c1c",
        "button_cancel_background_fill_hover": "#991b1b",
        "button_cancel_text_color": "white",
        "block_info_text_color": "*neutral_600",
        "body_text_color_subdued": "*neutral_600",
        "input_placeholder_color": "*neutral_500",
        "link_text_color": "*primary_700",
        "checkbox_label_background_fill_selected": "*primary_700",
        "checkbox_label_text_color_selected": "white",
        "checkbox_background_color_selected": "*primary_700",
        "checkbox_border_color_selected": "*primary_700",
        "slider_color": "*primary_700",
    }
    dark = {
        "checkbox_border_color_dark": "*neutral_400",
        "checkbox_border_color_hover_dark": "*neutral_200",
        "checkbox_border_color_focus_dark": "*neutral_200",
        "button_primary_background_fill_dark": "*primary_700",
        "button_primary_background_fill_hover_dark": "*primary_600",
        "button_primary_text_color_dark": "white",
        "button_cancel_background_fill_dark": "#b91c1c",
        "button_cancel_background_fill_hover_dark": "#991b1b",
        "button_cancel_text_color_dark": "white",
        "block_info_text_color_dark": "*neutral_300",
        "body_text_color_subdued_dark": "*neutral_300",
        "input_placeholder_color_dark": "*neutral_400",
        "link_text_color_dark": "*primary_300",
        "block_title_text_color_dark": "*neutral_200",
        "checkbox_label_background_fill_selected_dark": "*primary_700",
        "checkbox_label_text_color_selected_dark": "white",
        "slider_color_dark": "*primary_400",
    }
    hues = {"primary_hue": "indigo", "secondary_hue": "indigo", "neutral_hue": "slate"}
    return gr.themes.Default(**hues, font=system, font_mono=mono).set(**colours, **dark)
