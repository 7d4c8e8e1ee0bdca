// Decodes token ids with llama.cpp for `llama_cpp.py`: one JSON object a line comes in, one goes out.
// usage: node llama.mjs FILE.gguf THREADS SEQUENCES COLUMNS
import readline from "node:readline";
import {getLlama} from "node-llama-cpp";

const [file, threads, sequences, columns] = [process.argv[2], ...process.argv.slice(3).map(Number)];
const llama = await getLlama({gpu: false, build: "never", maxThreads: threads, logLevel: "error"});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({sequences, contextSize: columns, threads, batchSize: 512});
const rows = Array.from({length: sequences}, () => context.getSequence());

async function answer(row, prompt, {max_new_tokens, temperature, seed}) {
    const tokens = [];
    await row.clearHistory();
    for await (const token of row.evaluate(prompt, {temperature, seed, yieldEogToken: true})) {
        tokens.push(token);
        if (tokens.length >= max_new_tokens || model.isEogToken(token)) break;
    }
    return tokens;
}

console.log(JSON.stringify({llama_cpp: llama.llamaCppRelease, threads: context.currentThreads || threads}));
for await (const line of readline.createInterface({input: process.stdin})) {
    const request = JSON.parse(line);
    const began = process.hrtime.bigint();
    const texts = await Promise.all(request.prompts.map((prompt, at) => answer(rows[at], prompt, request)));
    console.log(JSON.stringify({texts, seconds: Number(process.hrtime.bigint() - began) / 1e9}));
}
process.exit(0);
