"""langchain-openai: chat, streams, tools, structured output, completions, embeddings."""

import asyncio

from common import ASK, CITY, KEY, TOOL, URL, tell
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

WHERE = {"base_url": f"{URL}/v1", "api_key": KEY, "max_retries": 0}
chat = ChatOpenAI(model="demo", temperature=0, max_tokens=24, **WHERE)
longer = ChatOpenAI(model="demo", temperature=0, max_tokens=200, **WHERE)
responses = ChatOpenAI(model="demo", temperature=0, max_tokens=24, use_responses_api=True, **WHERE)
QUESTION = ASK[0]["content"]


async def streamed():
    """The text of an asynchronous stream."""
    return "".join([chunk.content async for chunk in chat.astream(QUESTION)])


answer = chat.invoke(QUESTION)
call = longer.bind_tools([TOOL], tool_choice="get_weather").invoke("Weather in Paris?").tool_calls[0]
structured = longer.with_structured_output({"title": "city", **CITY}, method="json_schema").invoke("Paris, 3 days")
embeddings = OpenAIEmbeddings(model="embedder", check_embedding_ctx_length=False, **WHERE)
by_ids = OpenAIEmbeddings(model="embedder", dimensions=8, check_embedding_ctx_length=False, **WHERE)
tell(
    whole=answer.content,
    usage=answer.usage_metadata["output_tokens"],
    sync="".join(chunk.content for chunk in chat.stream(QUESTION)),
    text=asyncio.run(streamed()),
    call=[call["name"], call["args"]],
    structured=structured,
    responses=responses.invoke(QUESTION).text,
    plain=OpenAI(model="demo", temperature=0, max_tokens=5, **WHERE).invoke("one two"),
    vectors=embeddings.embed_documents(["a red cat", "a blue dog"]),
    short=by_ids.embed_query("a red cat"),
)
