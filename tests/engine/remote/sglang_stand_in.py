"""A server that speaks as SGLang's source does, over an embedded engine. Not SGLang."""

from pathlib import Path

from aiohttp import web
from safetensors.torch import load_file

from megatron_k2.engine.protocol import Request, SamplingParams


class StandIn:
    """Its routes; ``claims`` is what it says of its weights, ``fails`` why it reads none."""

    def __init__(self, engine):
        self.engine, self.version, self.is_paused = engine, "default", False
        self.fails, self.claims, self.read = "", None, []
        self.app = web.Application()
        self.app.add_routes(
            [
                web.get("/v1/models", self.models),
                web.get("/model_info", self.info),
                web.post("/generate", self.generate),
                web.post("/pause_generation", self.pause),
                web.post("/continue_generation", self.resume),
                web.post("/update_weights_from_disk", self.update),
            ]
        )

    async def models(self, _):
        return web.json_response({"data": [{"id": "m", "max_model_len": 64}]})

    async def info(self, _):
        return web.json_response({"weight_version": self.claims or self.version})

    async def pause(self, request):
        assert (await request.json())["mode"] in ("abort", "retract", "in_place")
        self.is_paused = True
        return web.json_response({"status": "ok"})

    async def resume(self, request):
        assert await request.json() == {}
        self.is_paused = False
        return web.json_response({"status": "ok"})

    async def update(self, request):
        body = await request.json()
        if self.fails:
            return web.json_response({"success": False, "message": self.fails})
        assert self.is_paused
        tensors = {}
        for path in Path(body["model_path"]).glob("*.safetensors"):
            tensors |= load_file(path)
        self.read.append(sorted(tensors))
        await self.engine.update_weights(tensors.items(), body["weight_version"])
        self.version = body["weight_version"]
        return web.json_response({"success": True, "message": "Succeeded to update model weights."})

    async def generate(self, request):
        body = await request.json()
        if self.is_paused:
            return web.json_response({"error": {"message": "paused"}}, status=503)
        sampling, top = body["sampling_params"], body["top_logprobs_num"]
        params = SamplingParams(
            sampling["max_new_tokens"],
            sampling["temperature"],
            sampling["top_p"],
            0 if sampling["top_k"] == -1 else sampling["top_k"],
            stop_token_ids=tuple(sampling["stop_token_ids"]),
            seed=sampling.get("sampling_seed"),
            logprobs=top,
            prompt_logprobs=top if body["logprob_start_len"] == 0 else None,
        )
        prompt, tokens, last = [], [], None
        asked = Request(body["rid"], tuple(body["input_ids"]), params)
        async for output in self.engine.generate(asked):
            prompt += output.prompt_tokens
            tokens += output.tokens
            last = output
        reason = {"type": last.finish_reason}
        if last.stop_id is not None:
            reason["matched"] = last.stop_id
        about = {
            "id": body["rid"],
            "finish_reason": reason,
            "weight_version": self.version,
            "output_token_logprobs": [[t.logprob, t.id, None] for t in tokens],
            "output_top_logprobs": [[[c.logprob, c.id, None] for c in t.top] for t in tokens],
        }
        if prompt:
            about["input_token_logprobs"] = [[t.logprob, t.id, None] for t in prompt]
            about["input_top_logprobs"] = [
                [[c.logprob, c.id, None] for c in t.top] or None for t in prompt
            ]
        return web.json_response(
            {"text": "", "output_ids": [t.id for t in tokens], "meta_info": about}
        )
