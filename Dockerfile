# blip2rt serve: the runtime and the server, without torch.
#
#   docker build -t blip2rt .
#   docker run --rm -p 8000:8000 -v "$PWD/engines:/engines:ro" blip2rt
#
# What stands behind the image's name takes the place of "/engines --host 0.0.0.0"; "--grpc-port 8001" adds gRPC.

FROM python:3.12-slim AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . /source
RUN python -m venv /opt/blip2rt && /opt/blip2rt/bin/pip install --no-cache-dir "/source[grpc]"

FROM python:3.12-slim
COPY --from=build /opt/blip2rt /opt/blip2rt
RUN useradd --system --uid 10001 blip2rt
USER blip2rt
ENV PATH=/opt/blip2rt/bin:$PATH
EXPOSE 8000 8001
VOLUME /engines
# SIGTERM, which `docker stop` sends: what was accepted is answered first. Give it the time of a request (--timeout).
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=5)"]
ENTRYPOINT ["blip2rt", "serve"]
CMD ["/engines", "--host", "0.0.0.0"]
