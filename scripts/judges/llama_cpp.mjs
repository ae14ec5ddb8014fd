// Continue prompts greedily with llama.cpp; the judge of scripts/judges/check_llama_cpp.
// node llama_cpp.mjs task.json answer.json, in a folder where `npm i node-llama-cpp --ignore-scripts` was run.
// Task: {runs: [{name, model, lora}], prompts: [{text, ids}], count, logits}. Answer: name → [{ids, tokens}]; with
// logits also the raw logits after every token of the prompt, from a context that keeps keys and values in float32.
import {readFileSync, writeFileSync} from "node:fs";
import {pathToFileURL} from "node:url";
import {availableParallelism} from "node:os";
import path from "node:path";

const home = path.join(process.cwd(), "node_modules", "node-llama-cpp", "dist", "index.js");
const {getLlama} = await import(pathToFileURL(home).href);
const task = JSON.parse(readFileSync(process.argv[2], "utf8"));
const threads = task.logits ? 1 : availableParallelism(); // tiny models are faster on one
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: threads});
const answer = {};
for (const run of task.runs) {
  try {
    const model = await llama.loadModel({modelPath: run.model});
    const lora = run.lora ? {adapters: [{filePath: run.lora, scale: 1}]} : undefined;
    const exact = task.logits ? {experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32", flashAttention: false} : {};
    const context = await model.createContext({contextSize: 512, threads, lora, ...exact});
    const sequence = context.getSequence();
    const bos = model.tokens.shouldPrependBosToken ? [model.tokens.bos] : [];
    answer[run.name] = [];
    for (const prompt of task.prompts) {
      await sequence.clearHistory();
      const tokens = [];
      for await (const token of sequence.evaluate(prompt.ids, {temperature: 0, yieldEogToken: true})) {
        tokens.push(token);
        if (tokens.length >= task.count || model.isEogToken(token)) break;
      }
      const result = {ids: [...bos, ...model.tokenize(prompt.text, false)], tokens};
      if (task.logits) {
        await sequence.clearHistory();
        const options = {generateNext: {logits: true, options: {temperature: 0}}};
        const outputs = await sequence.controlledEvaluate(prompt.ids.map((id) => [id, options]));
        result.logits = outputs.map(({next}) => [...next.logits.entries()].sort((a, b) => a[0] - b[0]).map((pair) => pair[1]));
      }
      answer[run.name].push(result);
    }
    await context.dispose();
    await model.dispose();
  } catch (error) {
    answer[run.name] = String(error);
  }
}
writeFileSync(process.argv[3], JSON.stringify(answer));
process.exit(0);
