// Executes a template as Ollama's template.Execute does, on {"template", "messages", "tools"} from standard input.
// Go's text/template is the real one; the values have the names and the JSON that Ollama's api package gives them.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type object map[string]any // a map prints as compact JSON, as the arguments of a call and a tool do in Ollama

func (o object) String() string {
	var text strings.Builder
	encoder := json.NewEncoder(&text)
	encoder.SetEscapeHTML(false)
	encoder.Encode(o)
	return strings.TrimSpace(text.String())
}

type message struct {
	Role, Content, Thinking string
	ToolCalls               []struct {
		Function struct {
			Name      string
			Arguments object
		}
	} `json:"tool_calls"`
}

func main() {
	var input struct {
		Template string
		Messages []message
		Tools    []object
	}
	if err := json.NewDecoder(os.Stdin).Decode(&input); err != nil {
		panic(err)
	}
	system := []string{}
	for _, message := range input.Messages {
		if message.Role == "system" {
			system = append(system, message.Content)
		}
	}
	values := map[string]any{"System": strings.Join(system, "\n\n"), "Messages": input.Messages, "Tools": input.Tools}
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(input.Template))
	if err := parsed.Execute(os.Stdout, values); err != nil {
		panic(err)
	}
}
