"""Pictures and pages from numbers, as text: SVG and HTML that need no other file, no network and no library.

- `svg.py`: scales, ticks, frames and legends. `charts.py`: lines, histograms, rows of bars or dots, heat maps.
- `page.py`: a page of sections and tables.
"""
