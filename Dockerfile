# docker build -t ringmark .
# With CUDA: docker build -t ringmark:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
FROM python:3.11-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

WORKDIR /opt/ringmark
COPY constraints.txt ./
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"
COPY . .
RUN pip install --no-cache-dir -c constraints.txt ".[serve]" && rm -rf /opt/ringmark

RUN useradd --uid 10001 --create-home ringmark && install -d -o ringmark -m 700 /jobs
USER ringmark
WORKDIR /home/ringmark
ENV HF_HOME=/tmp/huggingface RINGMARK_CACHE=/tmp/ringmark PYTHONUNBUFFERED=1
EXPOSE 8000
STOPSIGNAL SIGTERM
ENTRYPOINT ["ringmark"]
CMD ["serve", "--help"]
