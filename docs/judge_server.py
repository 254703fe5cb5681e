"""Example of a judge on a server: `python docs/judge_server.py 8000` scores images by their mean brightness."""

import base64
import io
import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

from PIL import Image, ImageStat

MODEL = "mean brightness"  # change it with the model: stored scores of another name are not used


def score(images, prompts):
    """Return one number for each image; replace it by your model."""
    return [ImageStat.Stat(image.convert("L")).mean[0] / 255 for image in images]


class Judge(BaseHTTPRequestHandler):
    """Reply to requests of images and prompts with scores."""

    def do_POST(self):
        """Read a request and write its reply."""
        try:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            images = [Image.open(io.BytesIO(base64.b64decode(png))) for png in request["images"]]
            status, reply = 200, {"scores": score(images, request["prompts"]), "model": MODEL}
        except Exception as error:  # tell the client what failed
            status, reply = 400, {"error": repr(error)}
        body = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    server = HTTPServer(("127.0.0.1", int(sys.argv[1])), Judge)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
