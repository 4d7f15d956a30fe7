"""A data set seen: one pass over its images, then tables, plots, look-alikes, leaks and advice.

`scan` measures every image in parallel, `near` finds those that look alike, `facts` sums up, `advice` says what to do
about it; `tables` prints, `plots` and `pictures` draw, `page` writes the HTML.
"""
