"""One HTML file about one run or several: plots that answer to the pointer, tables, no request.

``charts`` says what is drawn, ``events`` what happened, ``page`` puts it together. In the browser
``page.js`` draws, and ``page.css`` dresses it for screens wide and narrow, bright and dark, and for
paper.
"""
