"""The HTML report of a benchmark, piece by piece; `dlrm_deploy.bench.report_html.write_report` puts them together.

rows.py       reads rows, leniently: a field that is missing or odd is None
compare.py    panels of rows that belong together, and how much faster we are than the fastest peer
looks.py      one colour, line and marker per engine, the same in every chart
markup.py     HTML and SVG as text in which nothing from a row can become markup
axes.py       scales, ticks, frames of charts and their marks
*_chart.py    one chart each, with the table behind it
summary.py    the head of the page
page.py       the page; its styles and its script are the .css and .js files beside it
pictures.py   charts as pictures of their own, for documents
"""
