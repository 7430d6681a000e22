"""The plain server of the serving benchmark: Flask and `model.predict`, written as tutorials write it.

`BENCH_KERAS` names the Keras file. Served by gunicorn with one process and threads.
"""

import io
import os

import keras
import numpy as np
from flask import Flask, Response, jsonify, request
from PIL import Image

app = Flask(__name__)
model = keras.saving.load_model(os.environ["BENCH_KERAS"], compile=False)


@app.get("/ready")
def ready() -> Response:
    return jsonify(status="ready")


@app.post("/predict")
def predict() -> Response:
    image = Image.open(io.BytesIO(request.get_data())).convert("RGB").resize((32, 32))
    batch = np.asarray(image, dtype="float32")[np.newaxis]
    return jsonify(probabilities=model.predict(batch, verbose=0)[0].tolist())
