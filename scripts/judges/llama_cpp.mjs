// Continue prompts greedily with llama.cpp; the judge of scripts/judges/check_llama_cpp.
// node llama_cpp.mjs task.json answer.json, in a folder where `npm i node-llama-cpp --ignore-scripts` was run.
// Task: {runs: [{name, model, lora}], prompts: [{text, ids}], count}. Answer: name → [{ids, tokens}].
import {readFileSync, writeFileSync} from "node:fs";
import {pathToFileURL} from "node:url";
import {availableParallelism} from "node:os";
import path from "node:path";

const home = path.join(process.cwd(), "node_modules", "node-llama-cpp", "dist", "index.js");
const {getLlama} = await import(pathToFileURL(home).href);
const task = JSON.parse(readFileSync(process.argv[2], "utf8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: availableParallelism()});
const answer = {};
for (const run of task.runs) {
  try {
    const model = await llama.loadModel({modelPath: run.model});
    const lora = run.lora ? {adapters: [{filePath: run.lora, scale: 1}]} : undefined;
    const context = await model.createContext({contextSize: 512, threads: availableParallelism(), lora});
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
      answer[run.name].push({ids: [...bos, ...model.tokenize(prompt.text, false)], tokens});
    }
    await context.dispose();
    await model.dispose();
  } catch (error) {
    answer[run.name] = String(error);
  }
}
writeFileSync(process.argv[3], JSON.stringify(answer));
process.exit(0);
