"""The figures: one visual language, written as SVG by code, the same bytes every time.

Grey is frozen, the accent colour is trained. Colours are variables that follow the reader's light or dark mode, also where a
figure stands alone.
"""
