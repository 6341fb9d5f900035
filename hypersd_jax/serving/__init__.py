"""The live canvas: a web page that draws while its users type and sketch.

`desk` decides who is next, `request` what a message may ask for, `engine` draws, `worker` ties the three; they know
nothing of HTTP. `app`, `session`, `guard` and `server` put them behind a socket, `static/` is the page.
"""
