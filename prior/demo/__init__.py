"""The model in a browser page: draw, complete, sample, and look at the codes (`cli.py demo`).

    serve.py --> page.py --> html.py            what the visitor sees, as HTML
                         --> analysis.py        what the model says of a picture
                         --> codebook.py        what each code stands for, and where it is used
                         --> drawing.py         a drawing or a file as an image like those that the model has learned

Only `page` and `serve` know Gradio. Nothing is kept for a visitor: each answer follows from what the page sends.
"""
