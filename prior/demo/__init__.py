"""The model in a browser page: draw, complete, sample, and look at the codes (`cli.py demo`).

    serve.py --> page.py --> answers.py --> analysis.py     what the model says of a picture
                                        --> codebook.py     what each code stands for, and where it is used
                                        --> html.py         how all of it looks, with page.css
                                        --> drawing.py      a drawing or a file as an image like the model's own

Only `page` and `serve` know Gradio.
"""
