"""How the gradio page looks: calm, system fonts, light and dark, down to the width of a phone."""

from __future__ import annotations

import gradio as gr

CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; padding: 0 !important; }
.gradio-container > main, .gradio-container > main > .wrap, .gradio-container .main {
    padding: 14px 20px 40px !important; }
.gradio-container .main .main { padding: 0 !important; }
footer { display: none !important; }
.af-head { display: flex; align-items: baseline; gap: 4px 18px; flex-wrap: wrap; padding: 4px 2px; }
.af-head h1 { margin: 0; font-size: 1.3rem; font-weight: 650; letter-spacing: -.01em; color: var(--body-text-color); }
.af-status { display: flex; align-items: center; gap: 8px; color: var(--body-text-color-subdued); font-size: .92rem; }
.af-dot { width: 9px; height: 9px; border-radius: 50%; background: #9aa3b2; flex: none; }
.af-ready { background: #2f9e62; }
.af-loading, .af-starting { background: #d99a2b; animation: af-pulse 1.2s ease-in-out infinite alternate; }
.af-failed, .af-stopped { background: #d64545; }
@keyframes af-pulse { to { opacity: .35; } }
#af-main { display: grid; gap: 16px 28px; align-items: start;
    grid-template: "ask result" auto "settings result" 1fr / minmax(0, 5fr) minmax(0, 7fr); }
#af-ask { grid-area: ask; }
#af-settings { grid-area: settings; }
#af-result { grid-area: result; gap: 16px; }
#af-prompt textarea { min-height: 5.2em; font-size: 1rem; line-height: 1.5; }
#af-buttons { gap: 10px; flex-wrap: nowrap; }
#af-ask .gallery-item { font-size: .85rem; padding: 4px 9px; text-align: left; }
#af-ask .gallery { gap: 6px; }
#af-size-row, #af-seed-row { flex-wrap: nowrap; }
#af-random { align-content: center; }
.dark #af-settings { --neutral-200: #3a404b; }
#af-result .html-container { padding: 0; }
#af-progress:not(:has(.af-card)) { display: none; }
.af-card { border: 1px solid var(--border-color-primary); background: var(--block-background-fill);
    border-radius: 10px; padding: 12px 14px; font-size: .95rem; font-variant-numeric: tabular-nums; }
.af-track { height: 6px; border-radius: 3px; margin-top: 9px; overflow: hidden;
    background: var(--border-color-primary); }
.af-track > div { height: 100%; border-radius: 3px; background: var(--color-accent); transition: width .2s linear; }
.af-error { border-color: #d64545; background: color-mix(in srgb, #d64545 9%, var(--block-background-fill)); }
.af-head + .af-error { margin-top: 10px; }
.af-hint { margin-top: 4px; color: var(--body-text-color-subdued); }
.af-empty { display: grid; place-content: center; min-height: 300px; border-radius: 12px; font-size: .95rem;
    border: 1px dashed var(--border-color-primary); color: var(--body-text-color-subdued); }
.af-gallery { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 240px), 1fr)); }
.af-gallery figure { margin: 0; max-width: 520px; border: 1px solid var(--border-color-primary); border-radius: 12px;
    overflow: hidden; background: var(--block-background-fill); }
.af-gallery figure > a { display: block; background: var(--border-color-primary); }
.af-gallery img { display: block; width: 100%; height: auto; margin: 0; }
.af-gallery figcaption { display: grid; grid-template-columns: 1fr auto; gap: 2px 10px; padding: 10px 12px; }
.af-prompt { grid-column: 1 / -1; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; font-size: .92rem; }
.af-facts { white-space: nowrap; color: var(--body-text-color-subdued); font-size: .84rem;
    font-variant-numeric: tabular-nums; }
.af-save { font-size: .84rem; font-weight: 600; color: var(--link-text-color); text-decoration: none; }
.af-save:hover { text-decoration: underline; }
.af-warning { grid-column: 1 / -1; margin: 4px 0 0; font-size: .84rem; color: #b3741a; }
@media (max-width: 760px) {
    #af-main { grid-template: "ask" "result" "settings" / minmax(0, 1fr); }
    .gradio-container > main, .gradio-container > main > .wrap, .gradio-container .main {
        padding: 8px 10px 28px !important; }
    .af-empty { min-height: 130px; }
}
@media (prefers-reduced-motion: reduce) {
    .af-dot { animation: none !important; }
    .af-track > div { transition: none; }
}
"""

SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def make_theme() -> gr.themes.Base:
    """Plain surfaces on a quiet ground, one accent."""
    theme = gr.themes.Base(
        primary_hue="blue", neutral_hue="slate", radius_size="md", font=list(SANS), font_mono=list(MONO)
    )
    return theme.set(
        body_background_fill="#f6f7f9",
        body_background_fill_dark="#14161a",
        block_background_fill="#ffffff",
        block_background_fill_dark="#1c1f25",
        block_border_width="1px",
        block_shadow="none",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_text_color="white",
        button_secondary_background_fill_dark="#2a2e36",
        input_background_fill="#f3f5f8",
        input_background_fill_dark="#262a32",
        input_border_color_dark="#333842",
        border_color_primary="#dfe3e9",
        border_color_primary_dark="#2d323b",
        slider_color="*primary_500",
    )
